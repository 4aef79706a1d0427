"""Attention backend: another library's kernel, or another of torch's own, computes a denoiser's attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, Self

from vramplan.hardware.types import Accelerator
from vramplan.pipeline.types import Component
from vramplan.strategies.base import Axis, Placement, Quality

# Backends of torch itself that run wherever it does (diffusers 0.42, models/attention_dispatch.py).
_ANYWHERE = ("native", "_native_math", "flex")
# Those of one device that no accelerator here is.
_ELSEWHERE = {"_native_npu": "an Ascend NPU", "_native_xla": "a TPU"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBackend:
    """`component.set_attention_backend(name)`; `name` is one of diffusers' own.

    Other kernels change the last bits; Sage's round queries and keys to 8 bits.
    """

    name: ClassVar[str] = "attention_backend"
    axis: ClassVar[Axis] = "attention"
    simulated: ClassVar[bool] = False

    backend: str = "native"

    @property
    def quality(self) -> Quality:
        """Lossy where attention is quantized."""
        return "lossy" if "sage" in self.backend else "near_lossless"

    @property
    def unknown(self) -> str:
        """Both: no source says what a backend gains on the devices that are planned for."""
        return f"attention backend {self.backend}: memory and time are projected with torch's own attention"

    @classmethod
    def variants(cls, component: Component, accelerator: Accelerator) -> Iterable[Self]:
        """None: by hand only, as long as no measurement says what it gains."""
        return ()

    def refusal(self, component: Component, accelerator: Accelerator | None) -> str | None:
        """Only processors that ask for the backend, only known ones whose package and device are here."""
        if component.attention_backend_refusal is not None:
            return component.attention_backend_refusal
        return _unknown(self.backend) or _no_device(self.backend, accelerator) or _no_package(self.backend)

    def conflict_with(self, placement: Placement) -> str | None:
        """It goes with every placement."""
        return None

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """On the component's processors alone.

        diffusers' call makes the backend that of every other model of the process too (0.42, issue 14249): that is
        taken back at once.
        """
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

        active = Registry._active_backend
        try:
            for name in names:
                pipe.components[name].set_attention_backend(self.backend)
        finally:
            Registry.set_active_backend(active)

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """One line for each component, the last one for what the call leaves behind for other models."""
        registry = "_AttentionBackendRegistry"
        return [
            f"from diffusers.models.attention_dispatch import {registry}",
            f"active = {registry}._active_backend",
            *(f'pipe.{name}.set_attention_backend("{self.backend}")' for name in names),
            f"{registry}.set_active_backend(active)  # others than {', '.join(names)} keep theirs",
        ]


def _unknown(backend: str) -> str | None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [member.value for member in AttentionBackendName]
    if backend in known:
        return None
    near = get_close_matches(backend, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
    return f"{backend!r} is not an attention backend of this diffusers: {hint}"


def _no_device(backend: str, accelerator: Accelerator | None) -> str | None:
    if backend.endswith("_hub"):
        return f"{backend} downloads code and runs it, which no plan does: install the package of its kernel instead"
    if backend in _ELSEWHERE:
        return f"{backend} needs {_ELSEWHERE[backend]}"
    if backend in _ANYWHERE or (accelerator is not None and accelerator.device.startswith("cuda")):
        return None
    return f"{backend} needs a CUDA or ROCm device, not {accelerator.name if accelerator else 'the CPU'}"


def _no_package(backend: str) -> str | None:
    """What diffusers would raise when the backend is set: a package is missing or too old."""
    from diffusers.models import attention_dispatch

    try:
        attention_dispatch._check_attention_backend_requirements(attention_dispatch.AttentionBackendName(backend))
    except RuntimeError as error:
        return str(error)
    return None
