"""Frame-wise decoding: a video is decoded in shorter stretches of frames with blended seams."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from vramplan.pipeline.types import Component
from vramplan.strategies.base import Axis, Picture, Quality
from vramplan.workload import Workload

# VAEs whose stretches can be shorter and still join to the same video (diffusers 0.42): frames per stretch,
# frames that two share, and frames of a latent. HunyuanVideo decodes frame-wise by default.
_CLASSES = {"AutoencoderKLHunyuanVideo": (16, 4, 4)}
_LATE = "joins its stretches one frame late: from the first seam on every frame comes after its time"
# Reasons against VAEs that have the attributes or decode frame-wise anyway (diffusers 0.42, each tried on a small VAE
# of the class: tests/strategies/test_framewise_decoding.py).
_REASONS = {
    "AutoencoderKLLTXVideo": _LATE,
    "AutoencoderKLLTX2Video": _LATE,
    "AutoencoderKLMochi": "forgets the frames before each stretch (its convolutions pad instead): the picture jumps",
    "AutoencoderKLCosmos": "never reads use_framewise_decoding: it would do nothing",
    "AutoencoderKLCogVideoX": "decodes 2 latent frames at a time already, and with 1 it makes fewer frames",
    "AutoencoderKLMagvit": "decodes 1 latent frame at a time already",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FramewiseDecoding:
    """`vae.use_framewise_decoding` with stretches of `frames` frames, for encoding too.

    Each stretch is decoded alone and blended with the next one over the class's number of frames.
    """

    name: ClassVar[str] = "framewise_decoding"
    axis: ClassVar[Axis] = "decode"
    stock: ClassVar[bool] = True
    quality: ClassVar[Quality] = "near_lossless"
    leaves: ClassVar[tuple[str, ...]] = ("tile_", "use_framewise")

    frames: int = 8

    @classmethod
    def variants(cls, vae: Component, workload: Workload) -> Iterable[Self]:
        """The shortest stretch: it saves most, and few others are shorter than the class's own."""
        return (cls(),) if vae.class_name in _CLASSES and cls().refusal(vae, workload) is None else ()

    def refusal(self, vae: Component, workload: Workload) -> str | None:
        """Refuse classes that join stretches wrongly, partial latents, and stretches as long as the video."""
        if vae.class_name not in _CLASSES:
            reason = _REASONS.get(vae.class_name)
            no = f"{vae.class_name} has no frame-wise decoding that can be set"
            return no if reason is None else f"{no}: it {reason}"
        longest, shared, latent = _CLASSES[vae.class_name]
        able = range(shared + latent, longest, latent)
        if self.frames not in able:
            return f"frames={self.frames}: {vae.class_name} takes {', '.join(map(str, able))}; it starts at {longest}"
        if workload.num_frames <= self.frames + latent:
            return f"a stretch of {self.frames} frames saves nothing in a video of {workload.num_frames}"
        return None

    def shrink(self, picture: Picture, vae: Component) -> Picture:
        """One stretch of frames at a time."""
        return replace(picture, frames=min(picture.frames, self.frames))

    def apply(self, pipe: Any, names: Sequence[str]) -> None:
        """Set the attributes of the VAE: diffusers has no call for it."""
        for name in names:
            for attribute, value in self._attributes(pipe.components[name]).items():
                setattr(pipe.components[name], attribute, value)

    def code(self, names: Sequence[str], modules: Mapping[str, Any]) -> list[str]:
        """One line for each attribute."""
        return [
            f"pipe.{name}.{attribute} = {value}"
            for name in names
            for attribute, value in self._attributes(modules[name]).items()
        ]

    def _attributes(self, vae: Any) -> dict[str, Any]:
        """Return the attributes; the stride shrinks with the stretch, so that the overlap stays the same."""
        _, shared, _ = _CLASSES[type(vae).__name__]
        return {
            "tile_sample_min_num_frames": self.frames,
            "tile_sample_stride_num_frames": self.frames - shared,
            "use_framewise_decoding": True,
        }
