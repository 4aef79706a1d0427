"""Check whether a component's attention can be changed and its blocks compiled, from its modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramplan.pipeline.types import Role

if TYPE_CHECKING:
    import torch

# Processors that slicing replaces with equivalent ones, and these (diffusers 0.42, `Attention.set_attention_slice`);
# slicing would lose any other processor, such as an IP-Adapter's.
_SLICEABLE = frozenset(
    {
        *("AttnProcessor", "AttnProcessor2_0", "AttnAddedKVProcessor", "AttnAddedKVProcessor2_0"),
        *("SlicedAttnProcessor", "SlicedAttnAddedKVProcessor"),
    }
)


def attention_slicing_refusal(role: Role, module: torch.nn.Module) -> str | None:
    """Why attention slicing cannot be used; None for UNets and their ControlNets with replaceable processors."""
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
    """Why no attention backend can be set; None for diffusers' denoisers whose processors read the backend."""
    name = type(module).__name__
    if role not in ("denoiser", "control") or not hasattr(module, "set_attention_backend"):
        return f"{name} has no attention backend that can be set: it is no denoiser of diffusers"
    if any(hasattr(getattr(child, "processor", None), "_attention_backend") for child in module.modules()):
        return None
    return f"the attention processors of {name} do not ask for a backend: setting one would do nothing"


def compile_refusal(role: Role, module: torch.nn.Module) -> str | None:
    """Why blocks cannot be compiled; None for denoisers whose class names its repeated blocks and that contain one."""
    name, repeated = type(module).__name__, getattr(module, "_repeated_blocks", None)
    if role not in ("denoiser", "control") or not repeated:
        return f"{name} does not say which of its blocks repeat (_repeated_blocks)"
    if not any(type(child).__name__ in repeated for child in module.modules()):
        return f"{name} holds none of the blocks that it says repeat ({', '.join(repeated)})"
    return None
