"""Measuring on the processor, with what it takes for a card left to whoever has one."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vramplan.hardware import Accelerator, Hardware, Host, benchmark
from vramplan.hardware.measurements import measure_machine
from vramplan.hardware.types import Measurement
from vramplan.units import GIB, MIB


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that show whether it works, not how fast a machine is."""
    monkeypatch.setattr(benchmark, "_COPY_BYTES_WITHIN", MIB)
    monkeypatch.setattr(benchmark, "_DISK_BYTES", 8 * MIB)
    monkeypatch.setattr(benchmark, "_PRODUCT_SIDES", {"cpu": (64,)})


HOST = Host(total_bytes=8 * GIB, available_bytes=4 * GIB, cores=2, system="Linux")
CARD = Accelerator(kind="cuda", index=7, name="not here", uuid="GPU-1", total_bytes=GIB, free_bytes=GIB)


def sensible(item: Measurement) -> bool:
    return 0 < item.least <= item.median <= item.most and item.runs >= 1


@pytest.mark.parametrize("direction", ["host_to_device_pinned", "host_to_device_pageable", "device_to_host"])
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


def test_a_product_counts_multiplies_and_adds() -> None:
    found = benchmark.measure_product("cpu", "float32", side=256)
    assert sensible(found)
    assert (found.what, found.unit) == ("product_float32", "operations/s")


def test_a_product_grows_while_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_PRODUCT_SIDES", {"cpu": (32, 64, 128)})
    tried: list[int] = []

    def took(seconds: float) -> benchmark.Measurement:
        tried.clear()

        def rates(_work: object, _torch: object, _device: str, amount: int) -> list[float]:
            tried.append(round((amount / 2) ** (1 / 3)))
            return [amount / seconds]

        monkeypatch.setattr(benchmark, "_rates", rates)
        return benchmark.measure_product("cpu", "float32")

    took(benchmark._MOST_SECONDS / 100)
    assert tried == [32, 64, 128]
    took(benchmark._MOST_SECONDS / 4)  # the next would take twice the time there is
    assert tried == [32]


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
    assert names == ["host_to_device_pageable", "device_to_host", "product_float32", "disk_read"]
    monkeypatch.setattr(benchmark, "measure_copy", lambda *_: 1 / 0)
    second = measure_machine(machine, None)
    assert second.host.measured[:3] == first.host.measured[:3]
    (kept,) = (tmp_path / "cache" / "measurements").iterdir()
    kept.write_text("damaged")
    assert "could not be measured" in measure_machine(machine, None).notes[0]
    monkeypatch.undo()
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path / "cache"))
    other = replace(machine, host=replace(HOST, cores=3))
    measure_machine(other, None)
    assert len(list((tmp_path / "cache" / "measurements").iterdir())) == 2


def test_what_cannot_be_measured_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VRAMPLAN_CACHE", "0")
    monkeypatch.setenv("VRAMPLAN_OFFLOAD", str(tmp_path))
    found = measure_machine(Hardware(accelerators=(CARD,), host=HOST), CARD)
    assert found.accelerators == (CARD,)
    assert len(found.notes) == 4
    assert found.notes[0].startswith("host to device pinned could not be measured on cuda:7 (")
    assert [item.what for item in found.host.measured] == ["disk_read"]


@pytest.mark.skipif(os.environ.get("VRAMPLAN_CACHE") == "0", reason="nothing is kept")
def test_memory_is_no_disk() -> None:
    machine = Hardware(accelerators=(), host=replace(HOST, disk_in_memory=True))
    assert "disk_read" not in [item.what for item in measure_machine(machine, None).host.measured]
