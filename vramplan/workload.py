"""The workload: size of the picture, video or sound to generate, denoising steps and guidance."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vramplan.errors import UsageError

# Short names, and the argument of the pipelines' __call__ each stands for.
SHORT_NAMES = {"steps": "num_inference_steps", "frames": "num_frames", "batch": "num_images_per_prompt"}
_LARGEST = 1 << 20
# The longest sound of Stable Audio Open, 47.55 s, has 1,024 latents, like a picture with sides of this length.
_SOUND_SIDE = 256
# Arguments of video pipelines for the number of frames (diffusers 0.42: TextToVideoZero, WanAnimate).
FRAME_ARGUMENTS = ("num_frames", "video_length", "segment_frame_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One call of the pipeline: pixels, frames, pictures per prompt, denoising steps, guidance.

    `num_frames` is 1 for pictures, `height` and `width` are 1 for sound. With classifier-free guidance a
    `guidance_scale` above 1 doubles the denoiser's batch; None leaves the pipeline's own default.
    """

    height: int
    width: int
    num_frames: int = 1
    num_images_per_prompt: int = 1
    num_inference_steps: int = 50
    guidance_scale: float | None = None

    @property
    def sound(self) -> bool:
        """Whether the call generates sound, no picture."""
        return self.height == self.width == 1

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width in pixels to estimate with; for sound, those of a picture with as many latents."""
        return (_SOUND_SIDE, _SOUND_SIDE) if self.sound else (self.height, self.width)

    def latent_sides(self, scale: int) -> tuple[int, int]:
        """Height and width in latents, of a VAE with `scale` pixels per latent side."""
        height, width = self.sides
        return -(-height // scale), -(-width // scale)


WORKLOAD_NAMES = frozenset(field.name for field in fields(Workload))


def make_workload(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Workload:
    """Return the workload: the given values, else the defaults of the pipeline.

    `given` may use the short names steps, frames and batch, and `num_videos_per_prompt`; a None counts as not given.

    Raises:
        UsageError: a name is not part of a workload, or a count is not a whole number from 1 to 2^20.
    """
    chosen = dict(defaults)
    for name, value in given.items():
        target = SHORT_NAMES.get(name, "num_images_per_prompt" if name == "num_videos_per_prompt" else name)
        if target not in WORKLOAD_NAMES:
            raise UsageError(f"{name} is not part of a workload: use {', '.join(sorted(WORKLOAD_NAMES))}")
        if value is not None:
            chosen[target] = value
    for name in ("height", "width", "num_frames", "num_images_per_prompt", "num_inference_steps"):
        _check_count(name, chosen.get(name, 1))
    return Workload(**chosen)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST:
        raise UsageError(f"{name} must be a whole number from 1 to {_LARGEST}, not {value!r}")


def call_defaults(cls: type, config: Mapping[str, Any], scale: int, *, sound: bool = False) -> dict[str, Any]:
    """A pipeline's default workload: the defaults of its `__call__`, else the denoiser's own size.

    `config` is the denoiser's configuration, `scale` the VAE's pixels per latent.
    """
    parameters = inspect.signature(inspect.unwrap(cls.__call__)).parameters
    stated = {
        name: parameters[name].default
        for name in WORKLOAD_NAMES
        if name in parameters and _is_number(parameters[name].default)
    }
    frames = next((parameters[name].default for name in FRAME_ARGUMENTS if name in parameters), None)
    stated |= {"num_frames": frames} if _is_number(frames) else {}
    video = not parameters.keys().isdisjoint(FRAME_ARGUMENTS)
    sizes = {"height": 1, "width": 1} if sound else _sizes_from_config(config, scale, video=video)
    return sizes | stated


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sizes_from_config(config: Mapping[str, Any], scale: int, *, video: bool) -> dict[str, Any]:
    size = config.get("sample_size")
    side = size[0] if isinstance(size, list | tuple) else size
    height = config.get("sample_height") or side or 64
    width = config.get("sample_width") or (size[-1] if isinstance(size, list | tuple) else side) or 64
    if not isinstance(height, int) or not isinstance(width, int):
        height = width = 64
    sizes = {"height": height * scale, "width": width * scale}
    return sizes | ({"num_frames": config.get("sample_frames") or 49} if video else {})


def workload_text(work: Workload) -> str:
    """The workload for a person: `1360 x 768 x 81 frames, 2 per prompt, 50 steps`."""
    size = "sound" if work.sound else f"{work.width} x {work.height}"
    frames = f" x {work.num_frames} frames" if work.num_frames > 1 else ""
    batch = f", {work.num_images_per_prompt} per prompt" if work.num_images_per_prompt > 1 else ""
    return f"{size}{frames}{batch}, {work.num_inference_steps} steps"
