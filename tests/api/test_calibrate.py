"""The probes and their command, for real on the CPU: what they give on a card is not known here."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from tests.support.store import own_store  # noqa: F401 - a fixture
from vramplan.api import calibrate as command
from vramplan.api.calibrate_sample import measured_plans
from vramplan.calibration.context import context_bytes
from vramplan.calibration.measured_rates import with_measured_rates
from vramplan.calibration.records import CallRecord, ProbeRecord
from vramplan.calibration.store import read_store
from vramplan.cli.main import main
from vramplan.hardware import benchmark
from vramplan.hardware.types import Accelerator, Hardware, Host, Reading
from vramplan.units import GIB, MIB

CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=8 * GIB, free_bytes=None, driver="570")
HOST = Host(total_bytes=32 * GIB, available_bytes=30 * GIB)
pytestmark = pytest.mark.usefixtures("own_store")


def test_a_driver_that_does_not_say_what_is_free_leaves_the_context_unknown(monkeypatch) -> None:
    monkeypatch.setattr("vramplan.calibration.context.detect", lambda: Hardware(accelerators=(CARD,), host=HOST))
    assert context_bytes(CARD) is None


def test_the_context_is_what_is_gone_beside_torchs_own_memory(monkeypatch) -> None:
    """The driver's two answers and torch's are told; the kernels in between run for real, on the CPU.

    What torch has cached is free to it (`free_bytes`), and still not the driver's context.
    """
    from dataclasses import replace

    answers = iter([6 * GIB, 6 * GIB - 400 * MIB])
    held = iter([0, 100 * MIB])

    def detect() -> Hardware:
        free = next(answers)
        readings = (Reading(source="NVML", free_bytes=free),)
        card = replace(CARD, free_bytes=free + 60 * MIB, free_readings=readings)
        return Hardware(accelerators=(card,), host=HOST)

    monkeypatch.setattr("vramplan.calibration.context.detect", detect)
    monkeypatch.setattr(torch.accelerator.memory, "memory_reserved", lambda device: next(held))
    monkeypatch.setattr(Accelerator, "device", property(lambda self: "cpu"))
    assert context_bytes(CARD) == 300 * MIB


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose one card is the CPU."""
    here = Hardware(accelerators=(CARD,), host=HOST)
    for module in ("vramplan.api.machine", "vramplan.api.calibrate", "vramplan.calibration.context"):
        monkeypatch.setattr(f"{module}.detect", lambda: here)
    monkeypatch.setattr(Accelerator, "device", property(lambda self: "cpu"))
    monkeypatch.setattr(command, "_check_torch", lambda accelerator: None)
    monkeypatch.setattr(benchmark, "_COPY_BYTES", 4 * MIB)
    monkeypatch.setattr(benchmark, "_COPY_BYTES_WITHIN", 4 * MIB)
    monkeypatch.setattr(benchmark, "_DISK_BYTES", 8 * MIB)
    monkeypatch.setattr(benchmark, "_PRODUCT_SIDES_CPU", (16, 32, 64))


@pytest.mark.usefixtures("on_the_cpu")
def test_what_is_found_is_printed_and_kept() -> None:
    done = CliRunner().invoke(main, ["calibrate", "--no-pipeline", "--json"])
    assert done.exit_code == 0, done.output
    (record,) = read_store().records
    assert isinstance(record, ProbeRecord)
    shown = json.loads(done.stdout)
    assert shown["schema_version"] == 1
    assert shown["half_flops_per_s"] == record.half_flops_per_s > 0
    assert (record.device, record.driver, record.context_bytes) == ("a card", "570", None)
    assert record.notes == {}
    assert list(record.product_flops_per_s) == ["16", "32", "64"]
    assert list(record.attention_flops_per_s) == ["64", "128"]
    assert record.half_flops_per_s == max(record.product_flops_per_s.values())
    for rate in (record.pageable_to_device_bytes_per_s, record.device_to_pageable_bytes_per_s, record.launch_seconds):
        assert rate is not None
        assert 0 < rate < 1e12
    assert record.memory_bytes_per_s
    assert record.disk_bytes_per_s
    text = CliRunner().invoke(main, ["calibrate", "--no-pipeline"]).stdout
    for name in (
        "products of 64 x 64",
        "attention, heads of 128",
        "kernel launch ",
        "disk ",
        "device to host, pageable",
    ):
        assert f"  {name}" in text
    assert "driver context               not known" in text
    assert "host to device, page-locked  not known" in text  # nothing is page-locked for the CPU
    known = with_measured_rates(CARD).rates
    assert known is not None
    assert known.launch_seconds == read_store().records[-1].launch_seconds


@pytest.mark.usefixtures("on_the_cpu")
def test_what_was_measured_is_written_to_a_file(tmp_path) -> None:
    file = tmp_path / "rows.yaml"
    done = CliRunner().invoke(main, ["calibrate", "--no-pipeline", "--export", str(file)])
    assert done.exit_code == 0, done.output
    (written,) = yaml.safe_load(file.read_text(encoding="utf-8"))["probes"]
    (record,) = read_store().records
    assert isinstance(record, ProbeRecord)
    assert (written["device"], written["launch_seconds"]) == ("a card", record.launch_seconds)
    assert written["product_flops_per_s"] == record.product_flops_per_s
    done = CliRunner().invoke(main, ["calibrate", "--no-pipeline", "--export", str(tmp_path / "no" / "rows.yaml")])
    assert (done.exit_code, "--export" in done.stderr) == (2, True)


@pytest.mark.usefixtures("on_the_cpu")
def test_a_probe_that_fails_costs_its_own_number_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: str, dtype: str) -> float:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(benchmark, "measure_products", broken)
    record = command.calibrate(pipeline=False, say=lambda text: None, report=lambda plan, took: None)
    assert record.half_flops_per_s is None
    assert record.notes == {"products in float16": "no kernel image is available for this device"}
    assert record.memory_bytes_per_s


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ((), 1, "no accelerator was found"),
        (("--device", "cpu"), 1, "no accelerator was found"),
        (("--device", "rtx-4070"), 2, "is not in this machine"),
        (("--device", "cuda:7"), 2, "this machine has"),
    ],
)
def test_without_an_accelerator_it_says_so_in_one_line(monkeypatch, options: Any, code: int, words: str) -> None:
    for module in ("vramplan.api.machine", "vramplan.api.calibrate"):
        monkeypatch.setattr(f"{module}.detect", lambda: Hardware(accelerators=(), host=HOST))
    done = CliRunner().invoke(main, ["calibrate", *options])
    assert done.exit_code == code
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert read_store().records == ()


def test_where_nothing_is_kept_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMPLAN_CALIBRATION", "0")
    done = CliRunner().invoke(main, ["calibrate"])
    assert done.exit_code == 2
    assert "keeps nothing" in done.stderr


def test_the_sample_is_run_under_every_plan_that_can_be_and_kept(small_pipeline) -> None:
    """A small real pipeline on the CPU, which has one placement; the others are told with the reason."""
    pipe = small_pipeline("sd15-small")
    found = list(measured_plans(pipe, "cpu", height=64, width=64))
    assert [plan is not None for plan, _ in found] == [True, False, False, False, False]
    assert "needs an accelerator" in str(found[1][1])
    (record,) = read_store().records
    assert isinstance(record, CallRecord)
    assert record.measured.seconds_per_call > 0
    assert "_vramplan_applied" not in vars(pipe)
