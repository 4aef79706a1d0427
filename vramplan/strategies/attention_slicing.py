"""Attention slicing: the scores of a few heads at a time, where a device's attention holds all of them at once."""

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

    It takes torch's own attention off and holds scores itself, so that it only saves memory where torch would hold
    more of them; the sums of another order change the last bits.
    """

    name: ClassVar[str] = "attention_slicing"
    axis: ClassVar[Axis] = "attention"
    simulated: ClassVar[bool] = True

    size: Literal["auto", "max"] = "auto"

    @property
    def quality(self) -> Quality:
        """Near lossless."""
        return "near_lossless"

    @property
    def unknown(self) -> str:
        """Nothing: memory and time are those of its own simulation."""
        return ""

    @classmethod
    def variants(cls, component: Component, accelerator: Accelerator) -> Iterable[Self]:
        """Both sizes, where the device's attention holds scores."""
        if cls().refusal(component, accelerator) is not None or not holds_scores(accelerator, component.dtype):
            return ()
        return (cls(size="auto"), cls(size="max"))

    def refusal(self, component: Component, accelerator: Accelerator | None) -> str | None:
        """Only denoisers with sliced processors, in place of diffusers' own ones."""
        return component.attention_slicing_refusal

    def conflict_with(self, placement: Placement) -> str | None:
        """It goes with every placement."""
        return None

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """On the components themselves: the pipeline's call would slice others too."""
        for name in names:
            pipe.components[name].set_attention_slice(self.size)

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """One line for each component."""
        return [f'pipe.{name}.set_attention_slice("{self.size}")' for name in names]
