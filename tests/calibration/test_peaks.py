"""Measuring a call: nothing is made up, and a failing call is measured too."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from vramplan.calibration.peaks import measure_call, peak_rss_bytes
from vramplan.units import MIB


def test_on_the_cpu_vram_is_unknown_and_not_zero():
    with measure_call("cpu") as took:
        pass
    assert took.vram_allocated_bytes is None
    assert took.vram_reserved_bytes is None


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_seconds_are_those_of_the_block(device):
    with measure_call(device) as took:
        time.sleep(0.05)
    assert 0.05 <= took.seconds < 5


def test_ram_is_the_highest_so_far_and_at_least_what_is_held_now():
    held = psutil.Process().memory_info().rss
    with measure_call("cpu") as took:
        block = bytearray(64 * MIB)
        del block
    assert took.ram_bytes >= held
    assert peak_rss_bytes() >= took.ram_bytes


def test_memory_taken_and_given_back_counts():
    before = peak_rss_bytes()
    room = before - psutil.Process().memory_info().rss
    with measure_call("cpu") as took:
        block = bytearray(room + 96 * MIB)
        block[::4096] = b"x" * len(block[::4096])
        del block
    assert took.ram_bytes >= before + 64 * MIB


def test_a_call_that_fails_is_measured_and_its_error_passes():
    found = []

    def fails():
        with measure_call("cpu") as took:
            found.append(took)
            time.sleep(0.01)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fails()
    (took,) = found
    assert took.seconds >= 0.01
    assert took.ram_bytes > 0


def test_on_an_accelerator_peaks_are_reset_before_and_read_after_it_is_done(monkeypatch):
    events = []

    def fake(name, value=None):
        def call(device):
            events.append((name, device))
            return value

        return call

    values = {"max_memory_allocated": 5, "max_memory_reserved": 7, "synchronize": None, "reset_peak_memory_stats": None}
    for name, value in values.items():
        monkeypatch.setattr(torch.accelerator, name, fake(name, value))
    with measure_call("cuda:1") as took:
        events.append(("call", None))
    names = [name for name, _ in events]
    assert {device for _, device in events} == {"cuda:1", None}
    assert names.index("reset_peak_memory_stats") < names.index("call")
    assert names[names.index("call") + 1] == "synchronize"
    assert (took.vram_allocated_bytes, took.vram_reserved_bytes) == (5, 7)


@pytest.mark.parametrize(("platform", "factor"), [("linux", 1024), ("darwin", 1)])
def test_the_unit_of_the_peak_is_the_systems(monkeypatch, platform, factor):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3000))
    assert peak_rss_bytes() == 3000 * factor
