"""The cases of `gpu_accuracy.py`, and their figures as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vramplan.units import GIB

BLOCK = "group_offload:stream=true"
LEAF = "group_offload:type=leaf,stream=true"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One pipeline under one placement. `head` places the denoiser, `rest` everything else."""

    model: str
    head: str
    rest: str = ""
    decode: tuple[str, ...] = ()
    workload: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        shape = ",".join(f"{key}={value}" for key, value in self.workload.items())
        return " | ".join(filter(None, (self.model, self.head, self.rest, "+".join(self.decode), shape)))


def cases() -> list[Case]:
    """Small ones first, so that a short run has something of everything."""
    found = []
    for model, sizes in (
        ("stable-diffusion-1.5", ({}, {"num_images_per_prompt": 4}, {"height": 768, "width": 768})),
        ("stable-diffusion-xl", ({}, {"height": 768, "width": 1344}, {"num_images_per_prompt": 2})),
        ("flux.1-dev", ({}, {"height": 768, "width": 1344}, {"num_images_per_prompt": 2})),
    ):
        found += [Case(model=model, head="resident", workload=size) for size in sizes]
        found += [Case(model=model, head="model_cpu_offload")]
        found += [Case(model=model, head="resident", decode=("vae_tiling:tile=256",))]
        found += [Case(model=model, head=head, rest="resident") for head in (BLOCK, LEAF, "group_offload:blocks=4")]
    found += [Case(model="stable-diffusion-xl", head="weight_streaming:streamed=28,locked=28", rest="resident")]
    for streamed in ("15,locked=15", "30,locked=30", "30", "57,locked=57"):
        found += [Case(model="flux.1-dev", head=f"weight_streaming:streamed={streamed}", rest="resident")]
    video = ("vae_slicing", "vae_tiling:tile=240")
    found += [
        Case(model="cogvideox-2b", head="resident"),
        Case(model="cogvideox-5b", head="model_cpu_offload", decode=video),
        Case(model="cogvideox-5b", head=LEAF, rest="resident", decode=video, workload={"num_frames": 25}),
        Case(model="stable-diffusion-1.5", head="sequential_cpu_offload"),
        Case(model="flux.1-dev", head="sequential_cpu_offload"),
        Case(model="flux.1-dev", head=BLOCK + ",record_stream=true", rest="resident"),
        Case(model="flux.1-dev", head=LEAF + ",low_cpu_mem_usage=true", rest="resident"),
    ]
    order = list(dict.fromkeys(case.model for case in found))
    return sorted(found, key=lambda case: order.index(case.model))


def summary(found: dict[str, Any]) -> str:
    lines = [f"{'case':88} {'measured':>9} {'projected':>9}   error (reserved; allocated)"]
    for name, row in found["cases"].items():
        real, made = row.get("measured", {}), row.get("projected", {})
        if "peak_reserved_bytes" not in real or "peak_reserved_bytes" not in made:
            lines.append(f"{name[:88]:88} {real.get('out_of_memory') or made.get('error') or row.get('error')}"[:200])
            continue
        errors = [made[key] / real[key] - 1 for key in ("peak_reserved_bytes", "peak_allocated_bytes")]
        sizes = f"{real['peak_reserved_bytes'] / GIB:9.2f} {made['peak_reserved_bytes'] / GIB:9.2f}"
        lines.append(f"{name[:88]:88} {sizes}   {errors[0]:+.1%}; {errors[1]:+.1%}")
    return "\n".join(lines)
