"""Every tile that is offered joins to a picture of the right size, on real VAEs of every class with tiling."""

from __future__ import annotations

from functools import cache

import diffusers
import pytest
import torch

from tests.support.vaes import VAES, small_vae
from vramplan.pipeline.tiles import scaled_tiles, tiling_of
from vramplan.pipeline.types import Tiling

# Classes with `use_tiling` that tile by something else than pixels, or not at all (diffusers 0.42).
NOT_TILED = {
    "AutoencoderKLCosmos": "enable_tiling() changes nothing: there is no tiled decode",
    "AutoencoderKLHunyuanImageRefiner": "its tiles join to 36 x 24 pixels instead of 400 x 304",
    "AutoencoderKLKVAEVideo": "tiles by its own segments, without a size to set",
    "AutoencoderOobleck": "sound",
    "ConsistencyDecoderVAE": "tiles its encoder only",
}
LARGEST_TESTED = 96


@cache
def every_vae() -> dict[str, torch.nn.Module]:
    """One weightless VAE of each exported class that can be built from its defaults or the small configuration."""
    found = {}
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if name.startswith("Autoencoder") or name.endswith(("VAE", "VAEModel")) else None
        if isinstance(cls, type) and issubclass(cls, torch.nn.Module):
            with torch.device("meta"):
                found[name] = cls(**(VAES[name][0] if name == "AutoencoderKLHunyuanImage" else {}))
    return found


def decoded(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = vae.decode(latents)
    return result if isinstance(result, torch.Tensor) else result.sample


def latents_for(name: str, tiling: Tiling, side: int) -> torch.Tensor:
    """A little over a tile in height, and two tiles and a bit in width unless they are large."""
    _, channels, ratio, frames = VAES[name]
    scale = side / tiling.side / ratio
    height, width = int(tiling.height * scale) + 2, int(tiling.width * scale) + 3
    if side <= LARGEST_TESTED / 2:
        width = 2 * width
    shape = (height, width) if frames is None else (frames, height, width)
    return torch.randn((1, channels, *shape), generator=torch.Generator().manual_seed(0))


def sides_to_test(name: str) -> list[int]:
    """The smallest side of at least two latents and a larger one; the largest take too long on a CPU."""
    ratio = VAES[name][2]
    tiling = tiling_of(small_vae(name, device="meta"))
    sides = [] if tiling is None else [side for side in tiling.sides if side >= 2 * ratio][::-1]
    few = [side for side in sides if side <= LARGEST_TESTED] or sides[:1]
    return sorted({few[0], few[-1]}) if few else []


CASES = [(name, side) for name in VAES if name not in NOT_TILED for side in sides_to_test(name)]


def test_every_class_with_tiling_is_tried_or_listed() -> None:
    switched = {name for name, vae in every_vae().items() if hasattr(vae, "use_tiling")}
    tried = {name for name, _ in CASES} | {"AutoencoderKLAllegro"}
    assert switched == tried | set(NOT_TILED)
    assert {name for name in switched if tiling_of(every_vae()[name]) is None} == set(NOT_TILED)


def test_a_class_without_the_switch_has_no_tiling() -> None:
    without = [vae for vae in every_vae().values() if not hasattr(vae, "use_tiling")]
    assert len(without) > 5
    assert all(tiling_of(vae) is None for vae in without)


@pytest.mark.parametrize(("name", "side"), CASES)
def test_a_tile_decodes_to_the_size_of_the_untiled_picture(name: str, side: int) -> None:
    vae = small_vae(name)
    tiling = tiling_of(vae)
    assert tiling is not None
    latents = latents_for(name, tiling, side)
    vae.use_tiling = False
    plain = decoded(vae, latents)
    ratio = VAES[name][2]
    assert plain.shape[-2:] == (latents.shape[-2] * ratio, latents.shape[-1] * ratio)
    for attribute, value in scaled_tiles(vae, side).items():
        setattr(vae, attribute, value)
    vae.enable_tiling()
    tiled = decoded(vae, latents)
    assert tiled.shape == plain.shape
    assert not torch.equal(tiled, plain), "tiling did nothing"
    assert tiling.acts(*plain.shape[-2:], side)


@pytest.mark.parametrize("name", ["AutoencoderKLCosmos", "AutoencoderKLHunyuanImageRefiner"])
def test_the_tiling_of_this_class_is_still_broken(name: str) -> None:
    """Where this fails diffusers has mended it: take the class out of `_NO_TILED_DECODE`."""
    vae = small_vae(name)
    vae.tile_sample_min_height = vae.tile_sample_min_width = 64
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 48
    latents = torch.randn((1, 4, 1, 6, 6))
    plain = decoded(vae, latents)
    vae.enable_tiling()
    tiled = decoded(vae, latents)
    assert torch.equal(tiled, plain) if name == "AutoencoderKLCosmos" else tiled.shape[-1] < plain.shape[-1]


def test_the_tile_of_cogvideox_that_changes_the_size_is_not_offered() -> None:
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4, sample_height=64,
        sample_width=64,
    ).eval()  # fmt: skip
    tiling = tiling_of(vae)
    assert tiling is not None
    assert tiling.side == 32
    latents = torch.randn((1, 4, 1, 8, 8))
    vae.enable_tiling()
    assert decoded(vae, latents).shape[-2:] == (70, 68)
    assert all(side == tiling.side or side % 8 == 0 for side in tiling.sides)


def test_allegro_decodes_in_tiles_or_not_at_all() -> None:
    vae = every_vae()["AutoencoderKLAllegro"]
    tiling = tiling_of(vae)
    assert tiling is not None
    assert tiling.required
    assert tiling.sides == (320,)
    with pytest.raises(NotImplementedError):
        vae.decode(torch.zeros((1, 4, 1, 8, 8), device="meta"))


def test_minimax_tiles_unasked() -> None:
    tiling = tiling_of(every_vae()["AutoencoderKLMiniMaxH3"])
    assert tiling is not None
    assert tiling.always_on
    assert 16 not in tiling.sides  # its overlap would be a quarter of a latent


@pytest.mark.parametrize("name", sorted(set(VAES) - set(NOT_TILED)))
def test_scaled_attributes_exist_and_shrink_in_proportion(name: str) -> None:
    vae = every_vae()[name]
    tiling = tiling_of(vae)
    assert tiling is not None
    assert scaled_tiles(vae, 0) == scaled_tiles(vae, tiling.side) == {}
    for side in tiling.sides[1:]:
        for attribute, value in scaled_tiles(vae, side).items():
            assert isinstance(value, int)
            assert 0 < value < getattr(vae, attribute)
        height = scaled_tiles(vae, side).get("tile_sample_min_height", side)
        assert height / tiling.height == pytest.approx(side / tiling.side, rel=0.15)


@pytest.mark.parametrize("tile", [1, 7, 100, 10_000])
def test_a_tile_that_is_not_offered_cannot_be_set(tile: int) -> None:
    vae = every_vae()["AutoencoderKLCogVideoX"]
    with pytest.raises(ValueError, match="cannot have tiles"):
        scaled_tiles(vae, tile)


def test_the_overlap_of_two_axes_decides_together() -> None:
    """CogVideoX-5b: 240 x 360, overlaps of a sixth and a fifth."""
    tiling = tiling_of(every_vae()["AutoencoderKLCogVideoX"])
    assert tiling is not None
    assert (tiling.height, tiling.width) == (240, 360)
    assert tiling.sides == (240, 192, 144, 96, 48)


def test_tiling_acts_only_on_a_larger_picture() -> None:
    tiling = Tiling(height=240, width=360, sides=(240, 120))
    assert not tiling.acts(240, 360, 240)
    assert tiling.acts(241, 360, 240)
    assert tiling.acts(240, 361, 240)
    assert tiling.acts(240, 360, 120)
    assert not tiling.acts(120, 180, 120)
