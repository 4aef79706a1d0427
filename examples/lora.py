"""A LoRA on a pipeline that has a plan on it: the plan is made anew, with the LoRA's weights in its price.

    python examples/lora.py FOLDER-OR-HUB-ID LORA picture.png [--prompt TEXT]

LORA is what `load_lora_weights` takes: a folder, a file or a hub id. It needs `pip install peft`. Loading one while
offload hooks are on goes wrong in silence (diffusers 0.42), so `vramplan.changing` takes the plan off meanwhile.
"""

from __future__ import annotations

import click
import torch
from diffusers import DiffusionPipeline

import vramplan


def weight_bytes(plan: vramplan.Plan) -> int:
    return sum(component.weight_bytes for component in plan.model.components)


@click.command()
@click.argument("source")
@click.argument("lora")
@click.argument("output")
@click.option("--prompt", default="a photo of a red fox in the snow")
@click.option("--height", type=int)
@click.option("--width", type=int)
@click.option("--steps", type=int)
def main(source: str, lora: str, output: str, prompt: str, **size: int | None) -> None:
    pipe = DiffusionPipeline.from_pretrained(source, dtype=torch.bfloat16)
    without = vramplan.auto_configure(pipe, **size)
    with vramplan.changing(pipe):
        pipe.load_lora_weights(lora)
    applied = vramplan.applied_to(pipe)
    assert applied is not None  # a new plan is on
    plan = applied.plan
    print(plan)
    print(f"the LoRA weighs {weight_bytes(plan) - weight_bytes(without):,} bytes")
    work = plan.workload
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
