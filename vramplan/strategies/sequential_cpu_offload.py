"""Sequential CPU offload: one leaf module at a time is on the device, with the least memory, and by far the slowest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vramplan.errors import UsageError
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.modules import pipes_of
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.strategies.base import Axis, Hold, Quality, WithoutOptions, offload_refusal
from vramplan.strategies.model_cpu_offload import ACCELERATE_HOOK, forget_device


@dataclass(frozen=True, slots=True, kw_only=True)
class SequentialCpuOffload(WithoutOptions):
    """`pipe.enable_sequential_cpu_offload()`."""

    name: ClassVar[str] = "sequential_cpu_offload"
    axis: ClassVar[Axis] = "placement"
    stock: ClassVar[bool] = True
    quality: ClassVar[Quality] = "lossless"
    whole_pipeline: ClassVar[bool] = True
    freed: ClassVar[bool] = False
    direct: ClassVar[bool] = False
    leaves: ClassVar[tuple[str, ...]] = ACCELERATE_HOOK

    def refusal(self, component: Component, spec: PipelineSpec, accelerator: Accelerator | None) -> str | None:
        """Refuse pipelines for which `enable_sequential_cpu_offload` raises, and weights that its hooks never load."""
        if accelerator is None:
            return "sequential CPU offload needs an accelerator, and none was found"
        if component.sequential_offload_refusal and component.name not in spec.excluded:
            return component.sequential_offload_refusal
        return offload_refusal(component, spec, accelerator)

    def hold(self, component: Component, spec: PipelineSpec) -> Hold:
        """One leaf while it runs; an excluded component stays on the device."""
        size = component.weight_bytes
        if component.name in spec.excluded:
            return Hold(running_bytes=size, idle_bytes=size)
        return Hold(
            running_bytes=component.geometry.largest_leaf_bytes,
            host_bytes=size,
            moved_in_bytes=size,
            leaf_hooks=component.geometry.leaf_count,
            pageable=True,
        )

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Make one call for the whole pipeline, from the CPU: modules on the device would stay there."""
        if device.partition(":")[0] == "cpu":
            # accelerate 1.15 loses nn.Parameter between "cpu" and "cpu:0" (set_module_tensor_to_device).
            raise UsageError("sequential CPU offload cannot run on the CPU itself: it needs another device")
        for part in pipes_of(pipe):
            forget_device(part)
        for name in names:
            pipe.components[name].to("cpu")
        pipe.enable_sequential_cpu_offload(device=device)

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Remove accelerate's hooks, which also restores the weights from the meta device."""
        for part in pipes_of(pipe):
            part.remove_all_hooks()

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """One line."""
        return [f'pipe.enable_sequential_cpu_offload(device="{device}")']
