"""Resident: the whole component stays on the device, the fastest placement if it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vramplan.hardware.types import Accelerator
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.strategies.base import Axis, Hold, Quality, WithoutOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident(WithoutOptions):
    """`component.to(device)`."""

    name: ClassVar[str] = "resident"
    axis: ClassVar[Axis] = "placement"
    stock: ClassVar[bool] = True
    quality: ClassVar[Quality] = "lossless"
    whole_pipeline: ClassVar[bool] = False
    freed: ClassVar[bool] = False
    direct: ClassVar[bool] = True

    def refusal(self, component: Component, spec: PipelineSpec, accelerator: Accelerator | None) -> str | None:
        """Refuse a pipeline with a device map."""
        if spec.device_map is not None:
            return (
                "the pipeline has a device map over several devices, which does not let a component be "
                "moved: call pipe.reset_device_map() first"
            )
        return None

    def hold(self, component: Component, spec: PipelineSpec) -> Hold:
        """All weights on the device throughout."""
        return Hold(running_bytes=component.weight_bytes, idle_bytes=component.weight_bytes)

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Move each component: the pipeline's own `to` would also move those that must stay."""
        for name in names:
            pipe.components[name].to(device)

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Do nothing: it sets no hooks."""

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """One line for each component."""
        return [f'pipe.{name}.to("{device}")' for name in names]
