"""Model CPU offload: whole components come to the device when they run, in the order of the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vramplan.hardware.types import Accelerator
from vramplan.pipeline.modules import pipes_of
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.strategies.base import ON_PIPE, Axis, Hold, Quality, WithoutOptions, offload_refusal

# Attributes that accelerate's hooks leave on modules, and the calls that set them on the pipeline (diffusers 0.42).
_CALL = tuple(ON_PIPE + name for name in ("_all_hooks", "_offload_device", "_offload_gpu_id"))
ACCELERATE_HOOK = ("_hf_hook", "_old_forward", "forward", *_CALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCpuOffload(WithoutOptions):
    """`pipe.enable_model_cpu_offload()`."""

    name: ClassVar[str] = "model_cpu_offload"
    axis: ClassVar[Axis] = "placement"
    stock: ClassVar[bool] = True
    quality: ClassVar[Quality] = "lossless"
    whole_pipeline: ClassVar[bool] = True
    freed: ClassVar[bool] = False
    direct: ClassVar[bool] = False
    leaves: ClassVar[tuple[str, ...]] = ACCELERATE_HOOK

    def refusal(self, component: Component, spec: PipelineSpec, accelerator: Accelerator | None) -> str | None:
        """Refuse pipelines for which `enable_model_cpu_offload` raises or has no effect."""
        if accelerator is None:
            return "model CPU offload needs an accelerator, and none was found"
        if spec.sequence is None:
            return f"{spec.class_name} has no model_cpu_offload_seq, so model CPU offload cannot be enabled"
        if not spec.frees_hooks:
            return (
                f"{spec.class_name} never calls maybe_free_model_hooks(), so one call's components would "
                "still be on the device in the next"
            )
        return offload_refusal(component, spec, accelerator)

    def hold(self, component: Component, spec: PipelineSpec) -> Hold:
        """Whole while it runs and until its successor does.

        An excluded component stays on the device. One outside the sequence has no predecessor and no successor
        (diffusers 0.42, `enable_model_cpu_offload`): it always counts.
        """
        size = component.weight_bytes
        if component.name in spec.excluded:
            return Hold(running_bytes=size, idle_bytes=size)
        if component.name not in (spec.sequence or ()):
            return Hold(running_bytes=size, idle_bytes=size, host_bytes=size)
        return Hold(running_bytes=size, lingers=True, host_bytes=size, pageable=True)

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Make one call for the whole pipeline."""
        for part in pipes_of(pipe):
            forget_device(part)
        pipe.enable_model_cpu_offload(device=device)

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Remove accelerate's hooks."""
        for part in pipes_of(pipe):
            part.remove_all_hooks()

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """One line."""
        return [f'pipe.enable_model_cpu_offload(device="{device}")']


def forget_device(pipe: Any) -> None:
    """Delete the device that an earlier offload call left behind.

    diffusers 0.42 takes `gpu_id or device.index or self._offload_gpu_id`: index 0 counts as not given, so a pipeline
    once offloaded to device 1 would always go there.
    """
    pipe.__dict__.pop("_offload_gpu_id", None)
