"""A picture, with one call in place of those that choose the memory settings.

    python examples/image.py FOLDER-OR-HUB-ID picture.png [--prompt TEXT]

FOLDER may be one that `make_pipeline.py sd15-small` made.
"""

from __future__ import annotations

import click
import torch
from diffusers import DiffusionPipeline

import vramplan


@click.command()
@click.argument("source")
@click.argument("output")
@click.option("--prompt", default="a photo of a red fox in the snow")
@click.option("--height", type=int)
@click.option("--width", type=int)
@click.option("--steps", type=int)
def main(source: str, output: str, prompt: str, **size: int | None) -> None:
    pipe = DiffusionPipeline.from_pretrained(source, dtype=torch.bfloat16)
    plan = vramplan.auto_configure(pipe, **size)
    print(plan)
    work = plan.workload  # what was asked for, and the pipeline's own for the rest
    picture = pipe(
        prompt=prompt,
        height=work.height,
        width=work.width,
        num_inference_steps=work.num_inference_steps,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]
    picture.save(output)


if __name__ == "__main__":
    main()
