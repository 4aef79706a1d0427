"""Videos that are decoded in stretches of frames: what may be set, and what diffusers would get wrong."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.specs import card, component, pipeline
from tests.support.vaes import VAES, small_vae
from vramplan.pipeline.component import describe_component
from vramplan.planner.candidates import rows
from vramplan.planner.fixed import Fixed
from vramplan.runtime.snapshot import decode_settings
from vramplan.strategies.framewise_decoding import FramewiseDecoding
from vramplan.strategies.settings import format_setting
from vramplan.workload import Workload

VIDEO = Workload(height=64, width=64, num_frames=33)
HUNYUAN = "AutoencoderKLHunyuanVideo"
REFUSED = {
    "AutoencoderKLLTXVideo": "one frame late",
    "AutoencoderKLLTX2Video": "one frame late",
    "AutoencoderKLMochi": "forgets the frames before",
    "AutoencoderKLCosmos": "never reads use_framewise_decoding",
    "AutoencoderKLCogVideoX": "decodes 2 latent frames at a time already",
    "AutoencoderKLMagvit": "decodes 1 latent frame at a time already",
    "AutoencoderKLWan": "has no frame-wise decoding",
    "AutoencoderKL": "has no frame-wise decoding",
}


def latents(name: str, frames: int) -> torch.Tensor:
    return torch.randn(1, VAES[name][1], frames, 2, 2, generator=torch.Generator().manual_seed(1))


def decoded(vae: Any, given: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae.decode(given, return_dict=False)[0]


def test_hunyuan_decodes_shorter_stretches_to_as_many_frames() -> None:
    vae = small_vae(HUNYUAN)
    seen: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[2]))
    given = latents(HUNYUAN, 9)
    whole = decoded(vae, given)
    assert max(seen) == 5  # 16 frames are 4 latents, and the one before
    seen.clear()
    before = decode_settings(vae)
    FramewiseDecoding().apply(SimpleNamespace(components={"vae": vae}), ["vae"])
    shorter = decoded(vae, given)
    assert max(seen) == 3
    assert shorter.shape == whole.shape
    assert not torch.equal(shorter, whole)
    vars(vae).update(before)
    assert torch.equal(decoded(vae, given), whole)


def test_the_stretches_of_hunyuan_are_in_time() -> None:
    """The last frame is a quarter that of the stretch before, decoded alone, and three quarters that of its own."""
    vae = small_vae(HUNYUAN)
    FramewiseDecoding().apply(SimpleNamespace(components={"vae": vae}), ["vae"])
    given = latents(HUNYUAN, 9)
    last = decoded(vae, given)[:, :, 32]
    vae.use_framewise_decoding = False
    before, own = decoded(vae, given[:, :, 6:9])[:, :, 8], decoded(vae, given[:, :, 7:9])[:, :, 4]
    torch.testing.assert_close(last, before / 4 + own * 3 / 4)


@pytest.mark.parametrize("name", [name for name, told in REFUSED.items() if told == "one frame late"])
def test_ltx_is_refused_as_diffusers_makes_every_frame_late(name: str) -> None:
    """Far from seams a frame should be nearest to its own of the whole decode; it is nearest to the one before."""
    vae, given = small_vae(name), latents(name, 17)
    whole = decoded(vae, given)
    vae.use_framewise_decoding = True
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 64, 48
    cut = decoded(vae, given)
    frame = 80  # of the second stretch, which has the frames from 48 to 112

    def distance(late: int) -> float:
        return (cut[:, :, frame] - whole[:, :, frame - late]).abs().mean().item()

    assert distance(1) < 0.6 * distance(0)
    assert distance(1) < 0.6 * distance(-1)


def test_mochi_is_refused_as_each_stretch_is_decoded_as_if_it_were_the_first() -> None:
    vae, given = small_vae("AutoencoderKLMochi"), latents("AutoencoderKLMochi", 4)
    vae.drop_last_temporal_frames = False
    parts = [decoded(vae, given[:, :, start : start + 2]) for start in (0, 2)]
    vae.use_framewise_decoding = True
    assert torch.equal(decoded(vae, given), torch.cat(parts, dim=2))
    vae._enable_framewise_decoding()
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        decoded(vae, given)


def test_cosmos_is_refused_as_it_never_reads_the_switch() -> None:
    vae, given = small_vae("AutoencoderKLCosmos"), latents("AutoencoderKLCosmos", 9)
    whole = decoded(vae, given)
    vae.use_framewise_decoding, vae.num_latent_frames_batch_size = True, 1
    assert torch.equal(decoded(vae, given), whole)


def test_cogvideox_is_refused_as_one_latent_frame_at_a_time_makes_fewer_frames() -> None:
    vae, given = small_vae("AutoencoderKLCogVideoX"), latents("AutoencoderKLCogVideoX", 9)
    whole = decoded(vae, given)
    vae.num_latent_frames_batch_size = 1
    assert decoded(vae, given).shape[2] < whole.shape[2]


@pytest.mark.parametrize(("name", "words"), REFUSED.items())
def test_what_cannot_be_is_refused_with_the_reason(name: str, words: str) -> None:
    vae = describe_component("vae", small_vae(name, device="meta"))
    assert words in str(FramewiseDecoding().refusal(vae, VIDEO))
    assert not list(FramewiseDecoding.variants(vae, VIDEO))


def test_only_stretches_that_act_and_join() -> None:
    vae = describe_component("vae", small_vae(HUNYUAN, device="meta"))
    assert list(FramewiseDecoding.variants(vae, VIDEO)) == [FramewiseDecoding(frames=8)]
    assert FramewiseDecoding(frames=12).refusal(vae, VIDEO) is None
    for frames in (0, 4, 10, 16, 32):
        assert "takes 8, 12" in str(FramewiseDecoding(frames=frames).refusal(vae, VIDEO))
    assert "saves nothing" in str(FramewiseDecoding().refusal(vae, replace(VIDEO, num_frames=9)))


def test_the_code_does_what_applying_does() -> None:
    pipes = [SimpleNamespace(components={"vae": vae}, vae=vae) for vae in (small_vae(HUNYUAN), small_vae(HUNYUAN))]
    FramewiseDecoding().apply(pipes[0], ["vae"])
    exec("\n".join(FramewiseDecoding().code(["vae"], pipes[1].components)), {"pipe": pipes[1]})
    assert decode_settings(pipes[0].vae) == decode_settings(pipes[1].vae)


def test_candidates_take_stretches_or_tiles() -> None:
    vae = replace(component("vae", role="vae"), class_name=HUNYUAN)
    spec = pipeline(component("transformer", blocks=4), vae, video=True)
    work = Workload(height=1024, width=1024, num_frames=61)
    found, _ = rows(spec, work, Fixed(placement={}), card())
    texts = [" ".join(map(format_setting, row.decode)) for row in found]
    tiles = [f"vae_slicing vae_tiling:tile={tile}" for tile in (512, 256)]
    assert list(dict.fromkeys(texts)) == ["", *tiles, "vae_slicing framewise_decoding"]
