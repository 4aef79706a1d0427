"""Layerwise casting: weights are rounded to 8 bits in memory and cast up layer by layer as they run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from vramplan.pipeline.types import Component
from vramplan.strategies.base import DIFFUSERS_HOOK, Axis, Quality

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerwiseCasting:
    """`component.enable_layerwise_casting(storage_dtype=..., compute_dtype=...)`.

    The component's class excludes some layers: FLUX.1 27 % of its weights, Wan 2 %. Rounded weights cannot be restored.
    """

    name: ClassVar[str] = "layerwise_casting"
    axis: ClassVar[Axis] = "weights"
    stock: ClassVar[bool] = True
    quality: ClassVar[Quality] = "lossy"
    quantized: ClassVar[str] = ""
    leaves: ClassVar[tuple[str, ...]] = DIFFUSERS_HOOK

    storage: Literal["float8_e4m3fn", "float8_e5m2"] = "float8_e4m3fn"

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """One setting, for denoisers."""
        return (cls(),) if component.role in ("denoiser", "control") else ()

    def refusal(self, component: Component) -> str | None:
        """Refuse classes outside of diffusers, and weights below 16 bits."""
        if component.library != "diffusers":
            return f"{component.class_name} is no model of diffusers: it has no layerwise casting"
        if component.quantized:
            return component.quantization_refusal
        if component.element_bytes < 2 or "layerwise_casting" in component.hooks:
            return f"the weights of {component.class_name} are stored in 8 bits already"
        return None

    def lighten(self, module: torch.nn.Module) -> None:
        """Cast the hollow weights, as the hooks do between two forwards."""
        self._cast(module)

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Cast each component, before it is hooked or moved."""
        for name in names:
            self._cast(pipe.components[name])

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Do nothing: diffusers refuses to undo it (0.42, `LayerwiseCastingHook.deinitalize_hook`)."""

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """One line for each component."""
        return [
            f"pipe.{name}.enable_layerwise_casting(storage_dtype=torch.{self.storage}, compute_dtype=pipe.{name}.dtype)"
            for name in names
        ]

    def _cast(self, module: Any) -> None:
        import torch

        module.enable_layerwise_casting(storage_dtype=getattr(torch, self.storage), compute_dtype=module.dtype)
