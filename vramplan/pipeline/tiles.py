"""Read and scale the tiles of a VAE, in sizes whose overlaps are whole numbers of latents.

diffusers names these attributes differently by class: one `min_size`, or `min_height` and `min_width`,
each in pixels (`tile_sample_`) and some in latents (`tile_latent_`), with an overlap factor or a stride.
A tile whose overlap is not a whole number of latents gives a picture of another size: a CogVideoX VAE
with a tile of 32 px decodes 64 x 64 to 70 x 68 (diffusers 0.42, seen).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from vramplan.pipeline.types import Tiling

Side = Literal["height", "width"]
_AXES: tuple[Side, ...] = ("height", "width")
# Classes whose enable_tiling() does not give a usable decode (diffusers 0.42, seen): Cosmos and the consistency
# decoder have no tiled decode at all; HunyuanImage's refiner joins its tiles to 36 x 24 instead of 400 x 304.
_NO_TILED_DECODE = frozenset({"AutoencoderKLCosmos", "ConsistencyDecoderVAE", "AutoencoderKLHunyuanImageRefiner"})


def tiling_of(vae: Any) -> Tiling | None:
    """The VAE's tile, None if its class has no tiling (`hasattr(vae, "use_tiling")`) or none that works."""
    if not hasattr(vae, "use_tiling") or type(vae).__name__ in _NO_TILED_DECODE:
        return None
    # AutoencoderKLAllegro cuts by a fixed (frames, height, width) kernel and raises without tiling (0.42).
    kernel = getattr(vae, "kernel", None)
    if isinstance(kernel, tuple) and len(kernel) == 3:
        return Tiling(height=kernel[1], width=kernel[2], sides=(min(kernel[1:]),), required=True)
    height, width = (_sample(vae, axis) for axis in _AXES)
    if height is None or width is None:
        return None
    side = min(height, width)
    sides = tuple(tile for tile in range(side, 0, -1) if tile == side or _fits(vae, tile, side))
    return Tiling(height=height, width=width, sides=sides, always_on=bool(vae.use_tiling))


def scaled_tiles(vae: Any, tile: int) -> dict[str, int]:
    """The VAE's tile attributes for a shorter side of `tile` pixels; empty for 0 or if nothing changes.

    The longer side shrinks in proportion, to the nearest smaller size whose overlap is whole. Raises ValueError if the
    VAE cannot have such tiles.
    """
    tiling = tiling_of(vae)
    if not tile or tiling is None or tile == tiling.side:
        return {}
    found: dict[str, int] = {}
    for axis in _AXES:
        scaled = _scale_axis(vae, axis, tile, tiling.side)
        if scaled is None:
            raise ValueError(f"{type(vae).__name__} cannot have tiles of {tile} px")
        found |= scaled
    return found


def _fits(vae: Any, tile: int, side: int) -> bool:
    return all(_scale_axis(vae, axis, tile, side) is not None for axis in _AXES)


def _scale_axis(vae: Any, axis: Side, tile: int, side: int) -> dict[str, int] | None:
    """The attributes along one axis: the shorter side gets exactly `tile`, the longer the nearest smaller size."""
    full = _sample(vae, axis)
    assert full is not None
    wanted = full * tile // side
    for sample in range(wanted, wanted // 2, -1):
        scaled = _scale(vae, axis, sample, full)
        if scaled is not None:
            return scaled
        if full == side:
            break
    return None


def _scale(vae: Any, axis: Side, sample: int, full: int) -> dict[str, int] | None:
    """The attributes along one axis for a tile of `sample` pixels, None if they are not whole numbers."""
    values = _attributes(vae, axis)
    if any(value * sample % full for value in values.values()):
        return None
    scaled = {name: value * sample // full for name, value in values.items()}
    ratio = _ratio(vae, values, axis)
    steps = [value for name, value in scaled.items() if "stride" in name or "overlap" in name]
    if sample % ratio or any(value % ratio for value in steps):
        return None
    overlap = getattr(vae, f"tile_overlap_factor_{axis}", getattr(vae, "tile_overlap_factor", 0.0))
    # The same two expressions as in diffusers' tiled_decode: the step in latents, the kept part in pixels.
    step, kept = int(sample // ratio * (1 - overlap)), sample - int(sample * overlap)
    return scaled if step > 0 and step * ratio == kept else None


def _attributes(vae: Any, axis: Side) -> Mapping[str, int]:
    """The spatial tile attributes along an axis; a single size for both axes counts for each."""
    return {
        name: value
        for name, value in vars(vae).items()
        if name.startswith("tile_") and name.endswith((axis, "min_size")) and isinstance(value, int)
    }


def _sample(vae: Any, axis: Side) -> int | None:
    value = getattr(vae, f"tile_sample_min_{axis}", getattr(vae, "tile_sample_min_size", None))
    return int(value) if isinstance(value, int | float) else None


def _ratio(vae: Any, values: Mapping[str, int], axis: Side) -> int:
    """The pixels per latent along an axis."""
    latent = values.get(f"tile_latent_min_{axis}", values.get("tile_latent_min_size"))
    sample = _sample(vae, axis)
    if latent and sample:
        return max(1, sample // latent)
    config = getattr(vae, "config", {})
    ratio = vars(vae).get("spatial_compression_ratio") or config.get("spatial_compression_ratio")
    return int(ratio or config.get("scale_factor_spatial") or 8)
