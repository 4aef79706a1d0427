"""Decode chunk size: a few frames of a video are decoded at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from vramplan.pipeline.types import Component
from vramplan.strategies.base import ON_PIPE, Axis, Picture, Quality
from vramplan.workload import Workload

# VAEs whose pipelines have the argument (diffusers 0.42: Stable Video Diffusion).
_CLASSES = ("AutoencoderKLTemporalDecoder",)
_SIZES = (8, 4, 2, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeChunkSize:
    """`pipe(..., decode_chunk_size=frames)`.

    The decoder processes the frames of one chunk together, so pictures at the seams change a little.
    """

    name: ClassVar[str] = "decode_chunk_size"
    axis: ClassVar[Axis] = "decode"
    stock: ClassVar[bool] = True
    quality: ClassVar[Quality] = "near_lossless"
    leaves: ClassVar[tuple[str, ...]] = (ON_PIPE + "decode_latents",)

    frames: int = 8

    @classmethod
    def variants(cls, vae: Component, workload: Workload) -> Iterable[Self]:
        """Chunks of 8 frames and fewer, if the video is longer."""
        return [cls(frames=size) for size in _SIZES if vae.class_name in _CLASSES and size < workload.num_frames]

    def refusal(self, vae: Component, workload: Workload) -> str | None:
        """Refuse VAEs whose pipeline lacks the argument, and chunks as long as the video."""
        if vae.class_name not in _CLASSES:
            return f"{vae.class_name} has no decoding in chunks of frames"
        if not 1 <= self.frames < workload.num_frames:
            return f"frames={self.frames}: a chunk has 1 frame or more, and fewer than the {workload.num_frames} of all"
        return None

    def shrink(self, picture: Picture, vae: Component) -> Picture:
        """One chunk of frames at a time."""
        return replace(picture, frames=min(picture.frames, self.frames))

    def apply(self, pipe: Any, names: Sequence[str]) -> None:
        """Replace `decode_latents` of the pipeline: the argument itself can only be given to a call."""
        decode, frames = type(pipe).decode_latents.__get__(pipe), self.frames

        def decode_latents(latents: Any, num_frames: int, decode_chunk_size: int | None = None) -> Any:
            return decode(latents, num_frames, frames)

        pipe.__dict__["decode_latents"] = decode_latents

    def code(self, names: Sequence[str], modules: Mapping[str, Any]) -> list[str]:
        """A comment: the argument is given to the call."""
        return [f"# call the pipeline with decode_chunk_size={self.frames}"]
