"""A real pipeline with random weights, run under a few plans to compare projected with measured memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from vramplan.calibration.peaks import Measured
from vramplan.errors import VramplanError
from vramplan.planfile.types import Plan
from vramplan.runtime.call import seeded_generator
from vramplan.runtime.load import release_memory
from vramplan.runtime.recording import calibrating
from vramplan.units import format_bytes

# The lightest of the bundled pipelines that has every part: two gigabytes in half precision.
MODEL = "stable-diffusion-1.5"
# With random weights the safety checker flags nothing, or everything.
_OMITTED = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False}
_PLACEMENTS = (
    "resident",
    "model_cpu_offload",
    "group_offload:type=leaf,stream=true",
    "group_offload:type=block",
    "sequential_cpu_offload",
)


def sample_pipeline(device: str, name: str = MODEL) -> Any:
    """Build the profile's pipeline with small random weights, on the CPU. Nothing is downloaded.

    Weights are filled on the device, which is faster.
    """
    import torch

    from vramplan.simulator.parts import parts_from_profile

    parts = parts_from_profile(name)
    accepted = inspect.signature(parts.cls.__init__).parameters  # type: ignore[misc]
    modules = {part: module for part, module in parts.modules.items() if part not in _OMITTED}
    for module in modules.values():
        module.to_empty(device=device)
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()
        module.to("cpu").eval()
    given = dict(parts.others) | _OMITTED | modules
    pipe = parts.cls(**{key: value for key, value in given.items() if key in accepted})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measured_plans(pipe: Any, device: str | None, **workload: Any) -> Iterator[tuple[Plan | None, Measured | str]]:
    """Run a few plans: yield and store the measurement of each, or yield the reason why one was not run."""
    import torch

    from vramplan.api.apply import apply_plan
    from vramplan.api.plan import plan as make_plan
    from vramplan.simulator.run import call_inputs

    for placement in _PLACEMENTS:
        try:
            plan = make_plan(pipe, device=device, settings={"placement": placement}, allow="lossless", **workload)
            applied = apply_plan(pipe, plan)
        except VramplanError as error:
            yield None, f"{placement}: {error}"
            continue
        try:
            inputs = call_inputs(pipe, plan.workload) | {"generator": seeded_generator()}
            with calibrating(pipe) as measured:
                pipe(**inputs)
            yield plan, measured
        except torch.OutOfMemoryError:
            yield plan, f"{placement}: out of memory, projected at {format_bytes(plan.projected.vram_reserved_bytes)}"
        finally:
            applied.undo()
            release_memory()
