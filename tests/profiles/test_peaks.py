"""Every pipeline profile was simulated at its default workload, as it is now; some of them are again."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from vramplan.profiles.catalogue import load_pipeline_profile, pipeline_names

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from profile_peaks import RESULTS, digest, libraries, simulated

RECORDED: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
# One of each kind that is simulated fast: UNet, transformer, video, sound; and with VRAMPLAN_TESTS=all, as
# `tests/simulator/test_families.py` has small ones of them, a motion adapter and no negative prompt.
AGAIN = ("stable-diffusion-2.1", "pixart-alpha", "ltx-video", "stable-audio-open")
if os.environ.get("VRAMPLAN_TESTS") == "all":
    AGAIN += ("animatediff", "z-image-turbo")
# AnimateDiff's adapter is copied into its UNet, the decoder of a cascade is given what its prior encoded, and pictures
# that nobody gives are not encoded.
NOT_RUN = {
    "animatediff": {"motion_adapter"},
    "stable-cascade": {"text_encoder", "prior_image_encoder"},
    "stable-cascade-prior": {"image_encoder"},
}


def test_every_profile_was_simulated_as_it_is() -> None:
    """Where this fails: python benchmarks/profile_peaks.py -o benchmarks/results/profile-peaks.json NAME."""
    found = {name: digest(load_pipeline_profile(name)) for name in pipeline_names()}
    assert {name: record["digest"] for name, record in RECORDED["profiles"].items()} == found


@pytest.mark.parametrize("name", pipeline_names())
def test_it_came_to_its_denoiser_and_every_component_ran(name: str) -> None:
    record, profile = RECORDED["profiles"][name], load_pipeline_profile(name)
    assert {"load", "encode", "denoise"} <= record["phases"].keys()
    assert ("decode" in record["phases"]) == (name != "stable-cascade-prior")
    weights = {part for part, item in profile.components.items() if item.parameters is not None}
    assert weights - set(record["components"]) == NOT_RUN.get(name, set())
    assert record["peak_allocated_bytes"] == max(record["phases"].values())


@pytest.mark.parametrize("name", AGAIN)
def test_simulated_again_it_takes_the_same(name: str) -> None:
    """To the byte with the libraries of the record; others may take a little more or less."""
    record, again = RECORDED["profiles"][name], simulated(name)
    if RECORDED["libraries"] == libraries():
        assert again | {"cpu_seconds": 0} == record | {"cpu_seconds": 0}
    assert again["phases"] == pytest.approx(record["phases"], rel=0.05)
