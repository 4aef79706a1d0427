"""Compiling: torch.compile generates kernels for the repeated blocks of a denoiser."""

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

    The first call compiles, and so does each call with another size. Fused kernels change the last bits.
    """

    name: ClassVar[str] = "compile_repeated_blocks"
    axis: ClassVar[Axis] = "compile"
    stock: ClassVar[bool] = True
    simulated: ClassVar[bool] = False

    @property
    def quality(self) -> Quality:
        """Near lossless."""
        return "near_lossless"

    @property
    def unknown(self) -> str:
        """Memory and time of compiled blocks, and those of compiling."""
        return "compiled blocks: memory and time are projected as if they were not, and without compiling them"

    @classmethod
    def variants(cls, component: Component, accelerator: Accelerator) -> Iterable[Self]:
        """Empty: without measurements of the gain it is only set by hand."""
        return ()

    def refusal(self, component: Component, accelerator: Accelerator | None) -> str | None:
        """Refuse a component whose class does not name its repeated blocks."""
        return component.compile_refusal

    def conflict_with(self, placement: Placement) -> str | None:
        """Refuse hooks on every leaf: a small FLUX then has 28 graphs in place of 3 (torch 2.13)."""
        if isinstance(placement, SequentialCpuOffload):
            return f"{placement.name} cuts blocks at every leaf, so that nothing is left to compile together"
        return None

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Compile in place, after everything else; state_dict and hooks do not change. Streaming moves its own hooks
        out of what is compiled.

        Raises:
            VramplanError: they cannot be moved out.
        """
        from vramplan.streaming.attach import stream_of

        for name in names:
            pipe.components[name].compile_repeated_blocks()
            stream = stream_of(pipe.components[name])
            if stream is not None:
                stream.refresh()

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """One line for each component."""
        return [f"pipe.{name}.compile_repeated_blocks()" for name in names]
