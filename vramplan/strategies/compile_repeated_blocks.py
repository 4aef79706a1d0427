"""Compiling: torch.compile makes kernels of its own for the blocks that a denoiser repeats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from vramplan.hardware.types import Accelerator
from vramplan.pipeline.types import Component
from vramplan.strategies.base import Axis, Placement, Quality
from vramplan.strategies.sequential_cpu_offload import SequentialCpuOffload


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileRepeatedBlocks:
    """`component.compile_repeated_blocks()`, with graph breaks allowed: offload hooks are never compiled.

    The first call, and each one of another size, compiles for a while; fused kernels change the last bits.
    """

    name: ClassVar[str] = "compile_repeated_blocks"
    axis: ClassVar[Axis] = "compile"
    simulated: ClassVar[bool] = False

    @property
    def quality(self) -> Quality:
        """Near lossless."""
        return "near_lossless"

    @property
    def unknown(self) -> str:
        """Both, and what compiling takes."""
        return "compiled blocks: memory and time are projected as if they were not, and without compiling them"

    @classmethod
    def variants(cls, component: Component, accelerator: Accelerator) -> Iterable[Self]:
        """None: by hand only, as what it gains is not known."""
        return ()

    def refusal(self, component: Component, accelerator: Accelerator | None) -> str | None:
        """Only denoisers whose class says which of its blocks repeat."""
        return component.compile_refusal

    def conflict_with(self, placement: Placement) -> str | None:
        """Not with hooks on every leaf: a small FLUX then has 28 graphs in place of 3 (torch 2.13)."""
        if isinstance(placement, SequentialCpuOffload):
            return f"{placement.name} cuts blocks at every leaf, so that nothing is left to compile together"
        return None

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """In place, after everything else: state_dict and hooks stay as they are."""
        for name in names:
            pipe.components[name].compile_repeated_blocks()

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """One line for each component."""
        return [f"pipe.{name}.compile_repeated_blocks()" for name in names]
