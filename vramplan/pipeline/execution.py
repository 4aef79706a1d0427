"""Why a component's attention cannot be changed, or its blocks not be compiled, read off its modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramplan.pipeline.types import Role

if TYPE_CHECKING:
    import torch

# Processors that slicing replaces by others of the same meaning, and those others (diffusers 0.42,
# `Attention.set_attention_slice`): anything else, an IP-Adapter's say, would be lost.
_SLICEABLE = frozenset(
    {
        *("AttnProcessor", "AttnProcessor2_0", "AttnAddedKVProcessor", "AttnAddedKVProcessor2_0"),
        *("SlicedAttnProcessor", "SlicedAttnAddedKVProcessor"),
    }
)


def attention_slicing_refusal(role: Role, module: torch.nn.Module) -> str | None:
    """Only denoisers that are UNets and ControlNets of them have it."""
    name = type(module).__name__
    if role not in ("denoiser", "control") or not hasattr(module, "set_attention_slice"):
        return f"{name} has no attention slicing"
    others = {
        type(child.processor).__name__ for child in module.modules() if hasattr(child, "set_attention_slice")
        and hasattr(child, "processor")
    } - _SLICEABLE  # fmt: skip
    if others:
        return f"attention slicing would take {', '.join(sorted(others))} off {name}"
    return None


def attention_backend_refusal(role: Role, module: torch.nn.Module) -> str | None:
    """Only denoisers of diffusers whose attention processors ask which backend they are to take."""
    name = type(module).__name__
    if role not in ("denoiser", "control") or not hasattr(module, "set_attention_backend"):
        return f"{name} has no attention backend that can be set: it is no denoiser of diffusers"
    if any(hasattr(getattr(child, "processor", None), "_attention_backend") for child in module.modules()):
        return None
    return f"the attention processors of {name} do not ask for a backend: setting one would do nothing"


def compile_refusal(role: Role, module: torch.nn.Module) -> str | None:
    """Only denoisers of diffusers whose class names the blocks that repeat, and that hold one."""
    name, repeated = type(module).__name__, getattr(module, "_repeated_blocks", None)
    if role not in ("denoiser", "control") or not repeated:
        return f"{name} does not say which of its blocks repeat (_repeated_blocks)"
    if not any(type(child).__name__ in repeated for child in module.modules()):
        return f"{name} holds none of the blocks that it says repeat ({', '.join(repeated)})"
    return None
