"""How to call each small pipeline, and what to look at in what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vramplan.workload import Workload

# 64 x 64 is the smallest square on which the tiling of every one of their VAEs acts.
_COMMON: dict[str, Any] = {
    "prompt": "a photo of a red fox in the snow",
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
    "output_type": "pt",
}
_OWN: dict[str, dict[str, Any]] = {
    "sd15-small": {"guidance_scale": 7.5},
    "sdxl-small": {"guidance_scale": 5.0},
    "flux-small": {"guidance_scale": 3.5, "max_sequence_length": 64},
    "cogvideox-small": {"guidance_scale": 6.0, "num_frames": 9, "max_sequence_length": 64},
}


def call_kwargs(kind: str, *, seed: int = 0) -> dict[str, Any]:
    """The arguments of one short call, with a new generator: the same call twice gives the same output."""
    import torch

    return _COMMON | _OWN[kind] | {"generator": torch.Generator("cpu").manual_seed(seed)}


def output_tensor(result: Any) -> torch.Tensor:
    """The images (batch, channels, height, width) or the videos (batch, frames, channels, ...) of a call."""
    import torch

    return torch.as_tensor(result.frames if hasattr(result, "frames") else result.images)


def workload_of(kind: str) -> Workload:
    """The workload of that call."""
    from vramplan.workload import make_workload

    names = ("height", "width", "num_frames")
    return make_workload({}, {name: value for name, value in call_kwargs(kind).items() if name in names})
