"""Measuring on the processor, with what it takes for a card left to whoever has one."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from vramplan.hardware import benchmark
from vramplan.hardware.measurements import measure_machine
from vramplan.hardware.rates import WIDE_HEAD
from vramplan.hardware.types import Accelerator, Hardware, Host, Measurement
from vramplan.simulator.allocator import CachingAllocator
from vramplan.simulator.kernels import Kernels
from vramplan.simulator.parts import Parts
from vramplan.simulator.run import ComponentsOnly, simulate_call
from vramplan.units import GIB, MIB


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that show whether it works, not how fast a machine is."""
    monkeypatch.setattr(benchmark, "_COPY_BYTES_WITHIN", MIB)
    monkeypatch.setattr(benchmark, "_DISK_BYTES", 8 * MIB)
    monkeypatch.setattr(benchmark, "_PRODUCT_SIDES_CPU", (16, 32, 64))
    monkeypatch.setattr(benchmark, "_TOKENS_CPU", 32)


HOST = Host(total_bytes=8 * GIB, available_bytes=4 * GIB, cores=2, system="Linux")
CARD = Accelerator(kind="cuda", index=7, name="not here", uuid="GPU-1", total_bytes=GIB, free_bytes=GIB)


def sensible(item: Measurement) -> bool:
    return 0 < item.least <= item.median <= item.most and item.runs >= 1


@pytest.mark.parametrize("direction", get_args(benchmark.Direction))
def test_a_copy(direction: benchmark.Direction) -> None:
    found = benchmark.measure_copy("cpu", direction, size_bytes=8 * MIB)
    assert sensible(found)
    assert (found.what, found.unit, found.runs) == (direction, "bytes/s", 5)
    assert 1e8 < found.median < 1e12


def test_a_copy_is_measured_by_the_time_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) * 0.01)
    found = benchmark.measure_copy("cpu", "device_to_host", size_bytes=MIB)
    assert found.median == pytest.approx(MIB / 0.01, rel=0.01)


def ticking(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Every measurement takes so long."""
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) * seconds)


def test_products_are_of_three_sizes() -> None:
    found = benchmark.measure_products("cpu", "float32")
    assert all(map(sensible, found))
    assert [(item.what, item.unit) for item in found] == [
        (f"product_float32_{side}", "operations/s") for side in (16, 32, 64)
    ]


def test_a_product_counts_multiplies_and_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch, 1e-3)
    (found,) = benchmark.measure_products("cpu", "float32", sides=(256,))
    assert found.median == pytest.approx(2 * 256**3 / 1e-3, rel=1e-3)


def test_products_grow_while_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch, benchmark._MOST_SECONDS / 4)  # the next would take twice the time there is
    assert [item.what for item in benchmark.measure_products("cpu", "float32")] == ["product_float32_16"]


@pytest.mark.parametrize("size", benchmark.HEAD_SIZES)
def test_attention_counts_scores_and_their_product_with_the_values(monkeypatch, size: int) -> None:
    assert sensible(benchmark.measure_attention("cpu", "float32", size))
    ticking(monkeypatch, 1e-3)
    found = benchmark.measure_attention("cpu", "float32", size)
    assert (found.what, found.unit) == (f"attention_float32_{size}", "operations/s")
    assert found.median == pytest.approx(4 * benchmark._HEADS_CPU * 32 * 32 * size / 1e-3, rel=1e-3)


def test_the_head_sizes_are_one_of_each_kind() -> None:
    assert [size >= WIDE_HEAD for size in benchmark.HEAD_SIZES] == [False, True]


def test_a_launch_is_a_share_of_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    found = benchmark.measure_launch("cpu")
    assert sensible(found)
    assert (found.what, found.unit) == ("launch", "s")
    model, inputs = benchmark.small_unet("cpu")
    launches = benchmark._launches(lambda: model(**inputs))
    ticking(monkeypatch, 1e-3)
    assert benchmark.measure_launch("cpu").median == pytest.approx(1e-3 / launches, rel=1e-3)


def test_launches_are_counted_as_the_simulation_counts_them() -> None:
    model, inputs = benchmark.small_unet("cpu")
    with torch.device("meta"):
        weightless, _ = benchmark.small_unet("meta")

    def call(pipe: Any) -> None:
        pipe.components["unet"](**{name: torch.zeros(value.shape, device="cuda:0") for name, value in inputs.items()})

    parts = Parts(cls=ComponentsOnly, modules={"unet": weightless.float()})
    found = simulate_call(parts, lambda pipe: pipe.to("cuda:0"), call, CachingAllocator(), Kernels())
    with torch.no_grad():
        counted = benchmark._launches(lambda: model(**inputs))
    assert counted == pytest.approx(sum(use.launches for use in found.uses), rel=0.01)  # a constant more or less
    assert counted > 300


def test_a_cache_that_cannot_be_passed_by_is_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.setattr(benchmark.sys, "platform", "win32")
    with pytest.raises(OSError, match="from its cache"):
        benchmark.measure_disk_read(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_disk_is_read_and_left_clean(tmp_path: Path) -> None:
    found = benchmark.measure_disk_read(tmp_path, size_bytes=16 * MIB)
    assert sensible(found)
    assert list(tmp_path.iterdir()) == []


def test_the_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VRAMPLAN_OFFLOAD", str(tmp_path))
    machine = Hardware(accelerators=(), host=HOST)
    first = measure_machine(machine, None)
    names = [item.what for item in first.host.measured]
    assert names == [
        "host_to_device_pageable", "device_to_host_pageable", "within_device",
        "product_float32_16", "product_float32_32", "product_float32_64",
        "attention_float32_64", "attention_float32_128", "launch", "disk_read",
    ]  # fmt: skip
    monkeypatch.setattr(benchmark, "measure_copy", lambda *_: 1 / 0)
    second = measure_machine(machine, None)
    assert second.host.measured[:-1] == first.host.measured[:-1]
    (kept,) = (tmp_path / "cache" / "measurements").iterdir()
    kept.write_text("damaged")
    assert "could not be measured" in measure_machine(machine, None).notes[0]
    other = replace(machine, host=replace(HOST, cores=3))
    measure_machine(other, None)
    assert len(list((tmp_path / "cache" / "measurements").iterdir())) == 2


def test_what_cannot_be_measured_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VRAMPLAN_CACHE", "0")
    monkeypatch.setenv("VRAMPLAN_OFFLOAD", str(tmp_path))
    found = measure_machine(Hardware(accelerators=(CARD,), host=HOST), CARD)
    assert found.accelerators == (CARD,)
    assert len(found.notes) == 9
    assert found.notes[0].startswith("host to device pinned could not be measured: ")
    assert any(note.startswith("attention with heads of 128 could not be measured: ") for note in found.notes)
    assert [item.what for item in found.host.measured] == ["disk_read"]


@pytest.mark.skipif(os.environ.get("VRAMPLAN_CACHE") == "0", reason="nothing is kept")
def test_memory_is_no_disk() -> None:
    machine = Hardware(accelerators=(), host=replace(HOST, disk_in_memory=True))
    assert "disk_read" not in [item.what for item in measure_machine(machine, None).host.measured]
