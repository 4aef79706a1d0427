"""Build the arguments of a pipeline's call for a workload."""

from __future__ import annotations

from typing import Any

from vramplan.planfile.types import Plan


def call_arguments(
    pipe: Any, plan: Plan, prompt: str, negative_prompt: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Return the arguments of a call for the plan's workload, limited to those this pipeline's call accepts."""
    import inspect

    import torch

    work = plan.workload
    takes = inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters
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
        "generator": torch.Generator("cpu").manual_seed(seed),
    }
    return {name: value for name, value in wanted.items() if value is not None and name in takes}
