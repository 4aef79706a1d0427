"""Two pipelines of the same components, each with a plan of its own: a picture from text, then one from that picture.

    python examples/shared_components.py FOLDER-OR-HUB-ID picture.png again.png [--prompt TEXT]

The weights are loaded once. Hooks sit on the components and not on the pipelines, so only one plan can be on at a time:
each is put on for the calls of its pipeline and taken off after them. FOLDER may be one that
`make_pipeline.py sd15-small` made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image

import vramplan


@contextmanager
def under(pipe: Any, plan: vramplan.Plan) -> Iterator[Any]:
    """The pipeline with the plan on; afterwards its components are as they were."""
    applied = vramplan.apply_plan(pipe, plan)
    try:
        yield pipe
    finally:
        applied.undo()


@click.command()
@click.argument("source")
@click.argument("first")
@click.argument("second")
@click.option("--prompt", default="a photo of a red fox in the snow")
@click.option("--height", type=int)
@click.option("--width", type=int)
@click.option("--steps", type=int)
def main(source: str, first: str, second: str, prompt: str, **size: int | None) -> None:
    from_text = AutoPipelineForText2Image.from_pretrained(source, dtype=torch.bfloat16)
    from_picture = AutoPipelineForImage2Image.from_pipe(from_text)
    plans = [vramplan.plan(pipe, **size) for pipe in (from_text, from_picture)]
    print(*plans, sep="\n\n")

    work = plans[0].workload
    steps = {"num_inference_steps": work.num_inference_steps}
    with under(from_text, plans[0]) as pipe:
        seed = torch.Generator("cpu").manual_seed(0)
        picture = pipe(prompt, height=work.height, width=work.width, generator=seed, **steps).images[0]
    with under(from_picture, plans[1]) as pipe:
        seed = torch.Generator("cpu").manual_seed(1)
        again = pipe(f"{prompt}, oil painting", image=picture, strength=0.6, generator=seed, **steps).images[0]
    picture.save(first)
    again.save(second)


if __name__ == "__main__":
    main()
