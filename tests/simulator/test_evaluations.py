"""How often a call evaluates its denoiser, which some schedulers do more than once a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.calls import workload_of
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.describe import describe
from vramplan.pipeline.types import PipelineSpec
from vramplan.planner.demand import Pricer
from vramplan.simulator.footprint import SimulatedFootprint
from vramplan.simulator.model import SimulatedModel, simulated_footprint
from vramplan.strategies.resident import Resident
from vramplan.units import GIB
from vramplan.workload import Workload

CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=8 * GIB, free_bytes=8 * GIB)
STEPS = 4
SCHEDULERS = {"PNDMScheduler": 5, "HeunDiscreteScheduler": 7, "KDPM2DiscreteScheduler": 7, "DDIMScheduler": 4}


def small(small_pipeline: Callable[..., Any], scheduler: str) -> Any:
    import diffusers

    pipe = small_pipeline("sd15-small")
    options = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **options)
    return pipe


def projected(pipe: Any) -> tuple[PipelineSpec, Workload, SimulatedFootprint]:
    spec = describe(pipe).spec
    work = replace(workload_of("sd15-small"), num_inference_steps=STEPS)
    return spec, work, simulated_footprint(SimulatedModel(spec), work, CARD)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_forwards_are_those_of_a_real_call(small_pipeline: Callable[..., Any], scheduler: str) -> None:
    pipe = small(small_pipeline, scheduler)
    spec, work, footprint = projected(pipe)
    denoise = next(use for use in spec.uses if use.in_loop)
    forwards = footprint.evaluations * footprint.work(denoise, ()).forwards

    counted: list[None] = []
    pipe.unet.register_forward_hook(lambda *_: counted.append(None))
    size = {"height": work.height, "width": work.width}
    with torch.no_grad():
        pipe("a test", num_inference_steps=STEPS, output_type="latent", **size)

    assert len(counted) == SCHEDULERS[scheduler]
    assert forwards == pytest.approx(len(counted))


def test_an_evaluation_takes_as_long_whatever_the_scheduler(small_pipeline: Callable[..., Any]) -> None:
    found = {}
    for scheduler in ("PNDMScheduler", "DDIMScheduler"):
        spec, work, footprint = projected(small(small_pipeline, scheduler))
        demand = Pricer(spec, work, footprint, CARD)({part.name: Resident() for part in spec.components}, ())
        found[scheduler] = demand.seconds_per_step
    assert found["PNDMScheduler"] / found["DDIMScheduler"] == pytest.approx(5 / 4, rel=0.01)
