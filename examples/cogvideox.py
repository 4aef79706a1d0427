"""CogVideoX as in the diffusers documentation, with one call in place of the four that choose its memory.

    python examples/cogvideox.py FOLDER-OR-HUB-ID video.mp4 [--prompt TEXT]

The documentation's example loads the pipeline, replaces the scheduler, then calls
`enable_model_cpu_offload()` or `enable_sequential_cpu_offload()`, `vae.enable_slicing()` and
`vae.enable_tiling()` by hand. FOLDER may be one that `make_pipeline.py cogvideox-small` made.
"""

from __future__ import annotations

from typing import Any

import click
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline
from diffusers.utils import export_to_video

import vramplan


def load(source: str) -> Any:
    pipe = CogVideoXPipeline.from_pretrained(source, dtype=torch.bfloat16)
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe


@click.command()
@click.argument("source")
@click.argument("output")
@click.option("--prompt", default="A panda plays a guitar in a quiet bamboo forest.")
@click.option("--height", type=int)
@click.option("--width", type=int)
@click.option("--frames", type=int)
@click.option("--steps", type=int, default=50)
def main(source: str, output: str, prompt: str, steps: int, **size: int | None) -> None:
    pipe = load(source)
    plan = vramplan.auto_configure(pipe, steps=steps, **size)
    print(plan)
    work = plan.workload
    frames = pipe(
        prompt=prompt,
        height=work.height,
        width=work.width,
        num_frames=work.num_frames,
        num_inference_steps=work.num_inference_steps,
        guidance_scale=6,
        generator=torch.Generator("cpu").manual_seed(42),
    ).frames[0]
    export_to_video(frames, output, fps=8)


if __name__ == "__main__":
    main()
