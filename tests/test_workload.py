"""What is to be generated: what the user gave, else what the pipeline's own call would do."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.errors import UsageError
from vramplan.workload import WORKLOAD_NAMES, Workload, call_defaults, make_workload

SIZE = {"height": 512, "width": 768}


def test_what_is_given_wins_over_the_defaults() -> None:
    made = make_workload(SIZE | {"num_inference_steps": 50}, {"height": 1024, "num_inference_steps": 20})
    assert made == Workload(height=1024, width=768, num_inference_steps=20)


def test_none_is_not_given() -> None:
    assert make_workload(SIZE, dict.fromkeys(WORKLOAD_NAMES)) == Workload(**SIZE)


@pytest.mark.parametrize(
    ("short", "name"),
    [
        ("steps", "num_inference_steps"),
        ("frames", "num_frames"),
        ("batch", "num_images_per_prompt"),
        ("num_videos_per_prompt", "num_images_per_prompt"),
    ],
)
def test_short_names_are_the_long_ones(short: str, name: str) -> None:
    assert make_workload(SIZE, {short: 3}) == make_workload(SIZE, {name: 3})


@pytest.mark.parametrize("name", ["prompt", "heigth", "strength", ""])
def test_what_is_no_part_of_a_workload_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"is not part of a workload: use .*height"):
        make_workload(SIZE, {name: 1})


COUNTS = ("height", "width", "num_frames", "num_images_per_prompt", "num_inference_steps")
BAD: tuple[Any, ...] = (0, -1, 1.5, "512", True, (1 << 20) + 1, float("nan"))


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", BAD)
def test_a_count_is_a_whole_number_of_at_least_one(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} must be a whole number"):
        make_workload(SIZE, {name: value})


@given(st.fixed_dictionaries({name: st.integers(1, 1 << 20) for name in COUNTS}), st.none() | st.floats(0, 100))
def test_any_sensible_workload_is_kept(counts: dict[str, int], guidance: float | None) -> None:
    made = make_workload({}, counts | {"guidance_scale": guidance})
    assert {name: getattr(made, name) for name in COUNTS} == counts
    assert made.guidance_scale == guidance


def test_sound_has_no_size_and_is_estimated_as_a_picture_of_as_many_latents() -> None:
    sound = make_workload(call_defaults(diffusers.StableAudioPipeline, {"sample_size": 1024}, 2048, sound=True), {})
    assert sound.sound
    assert (sound.height, sound.width) == (1, 1)
    assert sound.sides == (256, 256)
    assert not Workload(height=64, width=1).sound
    assert Workload(height=64, width=1).sides == (64, 1)


def test_the_calls_own_defaults_come_first() -> None:
    told = call_defaults(diffusers.CogVideoXPipeline, {"sample_height": 60, "sample_width": 90, "sample_frames": 49}, 8)
    assert (told["height"], told["width"], told["num_frames"]) == (480, 720, 49)
    assert (told["num_inference_steps"], told["guidance_scale"]) == (50, 6)
    assert call_defaults(diffusers.WanPipeline, {}, 8)["num_frames"] == 81


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"sample_size": 128}, (1024, 1024)),
        ({"sample_size": [64, 96]}, (512, 768)),
        ({"sample_size": (32, 64, 96)}, (256, 768)),
        ({"sample_height": 60, "sample_width": 90}, (480, 720)),
        ({}, (512, 512)),
        ({"sample_size": None}, (512, 512)),
        ({"sample_size": "large"}, (512, 512)),
    ],
)
def test_the_size_is_the_denoisers_own_in_pixels(config: dict[str, Any], expected: tuple[int, int]) -> None:
    told = call_defaults(diffusers.StableDiffusionPipeline, config, 8)
    assert (told["height"], told["width"]) == expected
    assert "num_frames" not in told


@pytest.mark.parametrize(
    ("name", "frames"), [("TextToVideoZeroPipeline", 8), ("WanAnimatePipeline", 77), ("AnimateDiffPipeline", 16)]
)
def test_frames_may_go_by_other_names(name: str, frames: int) -> None:
    assert call_defaults(getattr(diffusers, name), {}, 8)["num_frames"] == frames


def test_every_pipeline_that_can_be_called_has_defaults_that_make_a_workload() -> None:
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline):
            if name in ("DiffusionPipeline", "VersatileDiffusionPipeline"):
                continue
            made = make_workload(call_defaults(cls, {}, 8), {})
            assert made.height >= 64, name
