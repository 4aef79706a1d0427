"""Attention slicing: attention scores are computed for a few heads at a time, on devices that hold all at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from vramplan.hardware.types import Accelerator
from vramplan.pipeline.types import Component
from vramplan.profiles.catalogue import holds_scores
from vramplan.strategies.base import Axis, Placement, Quality


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSlicing:
    """`component.set_attention_slice(size)`: half of the heads at a time (`auto`), or one (`max`).

    It replaces torch's own attention and holds scores itself, so it saves memory only on devices where torch holds more
    of them. Summing in another order changes the last bits.
    """

    name: ClassVar[str] = "attention_slicing"
    axis: ClassVar[Axis] = "attention"
    stock: ClassVar[bool] = True
    simulated: ClassVar[bool] = True

    size: Literal["auto", "max"] = "auto"

    @property
    def quality(self) -> Quality:
        """Near lossless."""
        return "near_lossless"

    @property
    def unknown(self) -> str:
        """Empty: memory and time come from a simulation with the setting."""
        return ""

    @classmethod
    def variants(cls, component: Component, accelerator: Accelerator) -> Iterable[Self]:
        """Both sizes, if the device's attention holds scores."""
        if cls().refusal(component, accelerator) is not None or not holds_scores(accelerator, component.dtype):
            return ()
        return (cls(size="auto"), cls(size="max"))

    def refusal(self, component: Component, accelerator: Accelerator | None) -> str | None:
        """Refuse components without sliced processors, and those with custom processors."""
        return component.attention_slicing_refusal

    def conflict_with(self, placement: Placement) -> str | None:
        """Compatible with every placement."""
        return None

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Set it on each component: the pipeline's call would slice others too."""
        for name in names:
            pipe.components[name].set_attention_slice(self.size)

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """One line for each component."""
        return [f'pipe.{name}.set_attention_slice("{self.size}")' for name in names]
