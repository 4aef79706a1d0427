"""Workloads that a pipeline accepts: pictures of whole patches, frame counts that its VAE can make, batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from vramplan.errors import UsageError
from vramplan.pipeline.latents import size_step, vae_scale
from vramplan.pipeline.types import PipelineSpec
from vramplan.workload import Workload

Dimension = Literal["size", "frames", "batch"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)

# The range of the search, as shares of the usual workload: sides from an eighth to four times, frames up to sixteen
# times; and pictures per prompt. Chosen, not measured.
_SMALLEST_SIDE, _LARGEST_SIDE = 1 / 8, 4
_MOST_FRAMES = 16
_MOST_PICTURES = 64


def legal_workloads(
    dimension: Dimension, spec: PipelineSpec, defaults: Mapping[str, Any], work: Workload
) -> tuple[Workload, ...]:
    """Return `work` with every size, frame count or batch that the pipeline accepts unchanged, smallest first.

    Pictures keep their aspect ratio as closely as whole patches allow. `defaults` are the pipeline's own workload.

    Raises:
        UsageError: an unknown dimension, frames for pictures, or a dimension other than the batch for sound.
    """
    if dimension not in DIMENSIONS:
        raise UsageError(f"largest {dimension}: there are {', '.join(DIMENSIONS)}")
    if spec.sound and dimension != "batch":
        raise UsageError(f"{spec.class_name} makes sound, which has no {dimension}: ask for the largest batch")
    if dimension == "frames":
        return tuple(replace(work, num_frames=count) for count in _frame_counts(spec, defaults, work))
    if dimension == "batch":
        return tuple(replace(work, num_images_per_prompt=count) for count in range(1, _MOST_PICTURES + 1))
    return tuple(replace(work, height=height, width=width) for height, width in _sizes(spec, work))


def _sizes(spec: PipelineSpec, work: Workload) -> Iterator[tuple[int, int]]:
    step, shorter = size_step(spec), min(work.height, work.width)
    first, last = int(shorter * _SMALLEST_SIDE) // step, shorter * _LARGEST_SIDE // step
    for count in range(max(1, first), max(1, last) + 1):
        scale = count / shorter
        yield max(1, round(work.height * scale)) * step, max(1, round(work.width * scale)) * step


def _frame_counts(spec: PipelineSpec, defaults: Mapping[str, Any], work: Workload) -> range:
    """Return frame counts congruent to the pipeline's own, modulo the frames of one latent: 81 for Wan, whose VAE makes
    1 frame and then 4 at a time; 88 for Allegro, whose VAE makes 4 at a time."""
    if not spec.video:
        raise UsageError(f"{spec.class_name} makes pictures: ask for the largest size or batch")
    _, step = vae_scale(next(iter(spec.vaes), None))
    usual = int(defaults.get("num_frames", work.num_frames))
    return range(usual % step or step, max(usual, work.num_frames) * _MOST_FRAMES + 1, step)
