"""Attention backend: another library's kernel, or another of torch's own, computes a denoiser's attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, Self

from vramplan.hardware.types import Accelerator
from vramplan.pipeline.types import Component
from vramplan.strategies.base import Axis, Placement, Quality

# Backends of torch itself, which run on every device (diffusers 0.42, models/attention_dispatch.py).
_ANYWHERE = ("native", "_native_math", "flex")
# Backends for devices that are not supported here.
_UNSUPPORTED = {"_native_npu": "an Ascend NPU", "_native_xla": "a TPU"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBackend:
    """`component.set_attention_backend(name)`, with a name that diffusers knows.

    Other kernels change the last bits; Sage's kernels round queries and keys to 8 bits.
    """

    name: ClassVar[str] = "attention_backend"
    axis: ClassVar[Axis] = "attention"
    stock: ClassVar[bool] = True
    simulated: ClassVar[bool] = False

    backend: str = "native"

    @property
    def quality(self) -> Quality:
        """Lossy if attention is quantized."""
        return "lossy" if "sage" in self.backend else "near_lossless"

    @property
    def unknown(self) -> str:
        """Memory and time: no source gives the gain of a backend on these devices."""
        return f"attention backend {self.backend}: memory and time are projected with torch's own attention"

    @classmethod
    def variants(cls, component: Component, accelerator: Accelerator) -> Iterable[Self]:
        """Empty: without measurements of the gain it is only set by hand."""
        return ()

    def refusal(self, component: Component, accelerator: Accelerator | None) -> str | None:
        """Refuse processors that ignore the backend, and backends that are unknown or lack a package or device."""
        if component.attention_backend_refusal is not None:
            return component.attention_backend_refusal
        return (
            _unknown_backend(self.backend)
            or _device_refusal(self.backend, accelerator)
            or _package_refusal(self.backend)
        )

    def conflict_with(self, placement: Placement) -> str | None:
        """Compatible with every placement."""
        return None

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Set the backend on the component's processors only.

        diffusers' call also sets it for all other models of the process (0.42, issue 14249); that is undone here.
        """
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

        active = Registry._active_backend
        try:
            for name in names:
                pipe.components[name].set_attention_backend(self.backend)
        finally:
            Registry.set_active_backend(active)

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """One line for each component, and one that restores the backend of other models."""
        registry = "_AttentionBackendRegistry"
        return [
            f"from diffusers.models.attention_dispatch import {registry}",
            f"active = {registry}._active_backend",
            *(f'pipe.{name}.set_attention_backend("{self.backend}")' for name in names),
            f"{registry}.set_active_backend(active)  # others than {', '.join(names)} keep theirs",
        ]


def _unknown_backend(backend: str) -> str | None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [member.value for member in AttentionBackendName]
    if backend in known:
        return None
    near = get_close_matches(backend, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
    return f"{backend!r} is not an attention backend of this diffusers: {hint}"


def _device_refusal(backend: str, accelerator: Accelerator | None) -> str | None:
    if backend.endswith("_hub"):
        return f"{backend} downloads code and runs it, which no plan does: install the package of its kernel instead"
    if backend in _UNSUPPORTED:
        return f"{backend} needs {_UNSUPPORTED[backend]}"
    if backend in _ANYWHERE or (accelerator is not None and accelerator.device.startswith("cuda")):
        return None
    return f"{backend} needs a CUDA or ROCm device, not {accelerator.name if accelerator else 'the CPU'}"


def _package_refusal(backend: str) -> str | None:
    """Return the error of diffusers for a package that is missing or too old."""
    from diffusers.models import attention_dispatch

    try:
        attention_dispatch._check_attention_backend_requirements(attention_dispatch.AttentionBackendName(backend))
    except RuntimeError as error:
        return str(error)
    return None
