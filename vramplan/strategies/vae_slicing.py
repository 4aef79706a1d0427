"""VAE slicing: a batch is decoded one picture after another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from vramplan.pipeline.types import Component
from vramplan.strategies.base import Axis, Picture, Quality
from vramplan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeSlicing:
    """`vae.enable_slicing()`.

    The arithmetic is the same as for the whole batch. A device may use another kernel for a batch of one, with other
    rounding: 3e-6 of a range of 2 in float32 (a small `AutoencoderKL` on a CPU, batch of 4, diffusers 0.42).
    """

    name: ClassVar[str] = "vae_slicing"
    axis: ClassVar[Axis] = "decode"
    stock: ClassVar[bool] = True
    quality: ClassVar[Quality] = "lossless"
    leaves: ClassVar[tuple[str, ...]] = ("use_slicing",)

    @classmethod
    def variants(cls, vae: Component, workload: Workload) -> Iterable[Self]:
        """One setting, without options."""
        return (cls(),)

    def refusal(self, vae: Component, workload: Workload) -> str | None:
        """Refuse VAE classes without slicing: the pipelines of diffusers 0.42 no longer forward the call."""
        return None if vae.slicing else f"{vae.class_name} has no slicing"

    def shrink(self, picture: Picture, vae: Component) -> Picture:
        """One picture at a time."""
        return replace(picture, batch=1)

    def apply(self, pipe: Any, names: Sequence[str]) -> None:
        """Set it on the VAE itself."""
        for name in names:
            pipe.components[name].enable_slicing()

    def code(self, names: Sequence[str], modules: Mapping[str, Any]) -> list[str]:
        """One line for each VAE."""
        return [f"pipe.{name}.enable_slicing()" for name in names]
