"""What settings of attention and compiling leave on a module, read before and put back after."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# An object, the name of one of its attributes, and its value.
State = list[tuple[Any, str, Any]]


def kernel_state(module: torch.nn.Module) -> State:
    """Each submodule's compiled call, its attention processor, and the backend that is set on that."""
    found: State = []
    for child in module.modules():
        found.append((child, "_compiled_call_impl", child._compiled_call_impl))
        processor: Any = getattr(child, "processor", None)
        if processor is not None:
            found.append((child, "processor", processor))
        if hasattr(processor, "_attention_backend"):
            found.append((processor, "_attention_backend", processor._attention_backend))
    return found


def restore_kernels(state: Iterable[tuple[Any, str, Any]]) -> None:
    """Every attribute that is another object now as it was."""
    for holder, name, value in state:
        if getattr(holder, name) is not value:
            setattr(holder, name, value)
