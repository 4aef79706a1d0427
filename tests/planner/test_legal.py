"""What pipelines can be asked for."""

from __future__ import annotations

import inspect
import re

import pytest

from vramplan.errors import UsageError
from vramplan.pipeline.bundled import profile_class
from vramplan.pipeline.classes import class_facts
from vramplan.pipeline.describe import describe
from vramplan.planner.legal import legal_workloads, size_step
from vramplan.profiles.catalogue import load_pipeline_profile
from vramplan.workload import make_workload

NAMES = ("flux.1-fill-dev", "ltx-video", "mochi-1-preview", "stable-diffusion-xl", "wan2.2-ti2v-5b", "z-image-turbo")


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_multiples_of_what_the_pipeline_checks_for(name: str) -> None:
    spec = describe(name).spec
    source = inspect.getsource(profile_class(load_pipeline_profile(name)))
    checked = [int(text) for text in re.findall(r"height % (\d+) ", source)]
    if "self.vae_scale_factor * 2" in source or "vae_scale = self.vae_scale_factor * 2" in source:
        checked.append(16)
    assert checked
    assert all(size_step(spec) % number == 0 for number in checked)


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "ltx-video", "mochi-1-preview", "allegro", "stable-diffusion-xl"])
def test_the_usual_workload_is_legal_and_the_ladder_goes_up(name: str) -> None:
    described = describe(name)
    usual = make_workload(described.defaults, {})
    for dimension in ("size", "batch", *(["frames"] if described.spec.video else [])):
        ladder = legal_workloads(dimension, described.spec, described.defaults, usual)
        amounts = [(work.height * work.width, work.num_frames, work.num_images_per_prompt) for work in ladder]
        assert usual in ladder
        assert amounts == sorted(set(amounts))


def test_wan_takes_what_its_vae_makes_four_at_a_time() -> None:
    described = describe("wan2.1-t2v-1.3b")
    usual = make_workload(described.defaults, {"height": 480, "width": 832})
    counts = [work.num_frames for work in legal_workloads("frames", described.spec, described.defaults, usual)]
    assert counts[:3] == [1, 5, 9]
    sizes = [(work.height, work.width) for work in legal_workloads("size", described.spec, described.defaults, usual)]
    assert (240, 416) in sizes
    assert all(height % 16 == width % 16 == 0 for height, width in sizes)


def test_pictures_have_no_frames() -> None:
    described = describe("stable-diffusion-1.5")
    usual = make_workload(described.defaults, {})
    with pytest.raises(UsageError, match="makes pictures"):
        legal_workloads("frames", described.spec, described.defaults, usual)
    with pytest.raises(UsageError, match="there are size, frames, batch"):
        legal_workloads("height", described.spec, described.defaults, usual)  # type: ignore[arg-type]


def test_sound_has_batches_alone() -> None:
    described = describe("stable-audio-open")
    usual = make_workload(described.defaults, {})
    for dimension in ("size", "frames"):
        with pytest.raises(UsageError, match=f"StableAudioPipeline makes sound, which has no {dimension}"):
            legal_workloads(dimension, described.spec, described.defaults, usual)
    ladder = legal_workloads("batch", described.spec, described.defaults, usual)
    assert [work.num_images_per_prompt for work in ladder[:3]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("sound", "names"),
    [
        (True, ("AudioLDM2Pipeline", "MusicLDMPipeline", "StableAudio3Pipeline")),
        (False, ("LTX2Pipeline", "DDPMPipeline", "StableCascadeDecoderPipeline")),
    ],
)
def test_what_makes_sound_is_told_from_its_call(sound: bool, names: tuple[str, ...]) -> None:
    import diffusers

    assert {name: class_facts(getattr(diffusers, name)).sound for name in names} == dict.fromkeys(names, sound)
