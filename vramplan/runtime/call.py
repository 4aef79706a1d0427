"""Build the arguments of a pipeline's call for a workload."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vramplan.planfile.types import Plan

if TYPE_CHECKING:
    import torch


def seeded_generator(seed: int = 0) -> torch.Generator:
    """The random numbers of a call: drawn on the CPU, so that they are the same whatever device it runs on."""
    import torch

    return torch.Generator("cpu").manual_seed(seed)


def call_parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline class's call."""
    return inspect.signature(inspect.unwrap(cls.__call__)).parameters


def call_arguments(
    pipe: Any, plan: Plan, prompt: str, negative_prompt: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Return the arguments of a call for the plan's workload, limited to those this pipeline's call accepts."""
    return class_call_arguments(type(pipe), plan, prompt, negative_prompt, seed)


def class_call_arguments(
    cls: type, plan: Plan, prompt: str, negative_prompt: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Return the same for a pipeline class."""
    work = plan.workload
    takes = call_parameters(cls)
    wanted = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "height": work.height,
        "width": work.width,
        "num_frames": work.num_frames,
        "num_images_per_prompt": work.num_images_per_prompt,
        "num_videos_per_prompt": work.num_images_per_prompt,
        "num_inference_steps": work.num_inference_steps,
        "guidance_scale": work.guidance_scale,
        "generator": seeded_generator(seed),
    }
    return {name: value for name, value in wanted.items() if value is not None and name in takes}
