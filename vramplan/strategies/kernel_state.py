"""What settings of attention and compiling leave on a module, read before and put back after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class KernelState:
    """A module's compiled call, its attention processor, and the backend that is set on that; None for none."""

    compiled: Any
    processor: Any
    backend: Any

    @classmethod
    def of(cls, module: torch.nn.Module) -> KernelState:
        """That of the module itself, without the modules in it."""
        processor = getattr(module, "processor", None)
        return cls(module._compiled_call_impl, processor, getattr(processor, "_attention_backend", None))

    def restore(self, module: torch.nn.Module) -> None:
        """Whatever is another object now as it was; but a processor with weights, as an IP-Adapter's, is not ours."""
        if module._compiled_call_impl is not self.compiled:
            module._compiled_call_impl = self.compiled
        added = "processor" in module._modules
        if self.processor is not None and not added and getattr(module, "processor", None) is not self.processor:
            module.processor = self.processor
        if hasattr(self.processor, "_attention_backend"):
            self.processor._attention_backend = self.backend
