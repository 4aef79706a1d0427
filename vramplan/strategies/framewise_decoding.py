"""Frame-wise decoding: a video is decoded in shorter stretches of frames, whose seams are blended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from vramplan.pipeline.types import Component
from vramplan.strategies.base import Axis, Picture, Quality
from vramplan.workload import Workload

# VAEs whose stretches can be made shorter and still join to the same video (diffusers 0.42): the frames of one as the
# class sets it, the frames that two share, and the frames of a latent. HunyuanVideo's decodes so from the start.
_ABLE = {"AutoencoderKLHunyuanVideo": (16, 4, 4)}
_LATE = "joins its stretches one frame late: from the first seam on every frame comes after its time"
# Those that have attributes of that name, or decode so anyway, and why nothing can be set (diffusers 0.42, each tried
# on a small VAE of the class: tests/strategies/test_framewise_decoding.py).
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
    """`vae.use_framewise_decoding` with stretches of `frames` frames; encoding takes the same.

    Each stretch is decoded by itself and blended with the next one over as many frames as the class has it.
    """

    name: ClassVar[str] = "framewise_decoding"
    axis: ClassVar[Axis] = "decode"
    quality: ClassVar[Quality] = "near_lossless"
    leaves: ClassVar[tuple[str, ...]] = ("tile_", "use_framewise")

    frames: int = 8

    @classmethod
    def variants(cls, vae: Component, workload: Workload) -> Iterable[Self]:
        """The shortest stretch: it saves most, and the next one is the class's own but one."""
        return (cls(),) if vae.class_name in _ABLE and cls().refusal(vae, workload) is None else ()

    def refusal(self, vae: Component, workload: Workload) -> str | None:
        """Only classes that join stretches rightly, only whole latents, and only shorter ones than there are."""
        if vae.class_name not in _ABLE:
            reason = _REASONS.get(vae.class_name)
            no = f"{vae.class_name} has no frame-wise decoding that can be set"
            return no if reason is None else f"{no}: it {reason}"
        longest, shared, latent = _ABLE[vae.class_name]
        able = range(shared + latent, longest, latent)
        if self.frames not in able:
            return f"frames={self.frames}: {vae.class_name} takes {', '.join(map(str, able))}; it starts at {longest}"
        if workload.num_frames <= self.frames + latent:
            return f"a stretch of {self.frames} frames saves nothing in a video of {workload.num_frames}"
        return None

    def shrink(self, picture: Picture, vae: Component) -> Picture:
        """So many frames at a time."""
        return replace(picture, frames=min(picture.frames, self.frames))

    def apply(self, pipe: Any, names: Sequence[str]) -> None:
        """On the VAE itself, its attributes: diffusers has no call for it."""
        for name in names:
            for attribute, value in self._attributes(pipe.components[name]).items():
                setattr(pipe.components[name], attribute, value)

    def code(self, names: Sequence[str], modules: Mapping[str, Any]) -> list[str]:
        """The attributes."""
        return [
            f"pipe.{name}.{attribute} = {value}"
            for name in names
            for attribute, value in self._attributes(modules[name]).items()
        ]

    def _attributes(self, vae: Any) -> dict[str, Any]:
        """The stride shrinks by as much as the stretch, so that as many frames are blended as before."""
        _, shared, _ = _ABLE[type(vae).__name__]
        return {
            "tile_sample_min_num_frames": self.frames,
            "tile_sample_stride_num_frames": self.frames - shared,
            "use_framewise_decoding": True,
        }
