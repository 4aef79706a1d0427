"""`vramplan calibrate --export`: the benchmarks read what it writes, and nobody can tell whose machine it was."""

from __future__ import annotations

import getpass
import importlib.util
import json
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import vramplan
from tests.support.records import call, probe
from tests.support.store import own_store  # noqa: F401 - a fixture
from vramplan.api.calibrate import export_measurements
from vramplan.calibration.peaks import Measured
from vramplan.calibration.records import CallFacts, CallRecord, from_line, to_line
from vramplan.calibration.store import append
from vramplan.runtime.recording import record_of
from vramplan.units import GIB
from vramplan.view.shared import to_yaml

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.usefixtures("own_store")


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured_call(
    model: str = "stable-diffusion-1.5", placement: str = "model_cpu_offload", **settings: str
) -> CallRecord:
    """A call on a card under a plan for it, as it is kept."""
    told = {"placement": placement} | settings
    plan = vramplan.plan(model, device="rtx-4090", settings=told, simulate=False, height=512, width=512, steps=20)
    measured = Measured(
        seconds=3.0, seconds_per_step=0.1, vram_allocated_bytes=3 * GIB, vram_reserved_bytes=4 * GIB, ram_bytes=GIB
    )
    applied: Any = SimpleNamespace(plan=plan)
    return record_of(applied, measured)


def test_the_benchmarks_read_what_is_exported(tmp_path: Path) -> None:
    append(probe(device="NVIDIA GeForce RTX 4090", launch_seconds=3e-5, pageable_to_device_bytes_per_s=9e9))
    for placement in ("model_cpu_offload", "resident"):
        append(measured_call(placement=placement, decode="vae_slicing"))
    file = tmp_path / "rows.yaml"
    file.write_text(to_yaml(export_measurements()) + "\n", encoding="utf-8")
    made = CliRunner().invoke(loaded("accuracy").main, ["--rows", str(file)])
    assert made.exit_code == 0, made.output
    rows = [line.split("|") for line in made.output.splitlines() if line.startswith("| stable-diffusion-1.5-")]
    assert len(rows) == 4, made.output
    assert {row[2].strip() for row in rows} == {"model_cpu_offload + vae_slicing", "resident + vae_slicing"}
    assert {float(row[5]) for row in rows} == {3, 4}
    assert all(0.5 < float(row[6]) < 8 for row in rows)
    times = loaded("times")
    timed = CliRunner().invoke(times.main, ["--rows", str(file)])
    assert timed.exit_code == 0, timed.output
    assert "2 rows judged" in timed.output
    rates = times.card("rtx-4090").rates
    assert (rates.launch_seconds, rates.pageable_bytes_per_s) == (3e-5, 9e9)


def test_no_name_and_no_path_leaves_the_machine(tmp_path: Path) -> None:
    """Of calls with a file among their settings nothing is written but their number."""
    home = str(Path.home() / "models" / "flux.gguf")
    plain = measured_call()
    assert plain.facts is not None
    settings = {"placement.unet": "resident", "weights.unet": f"gguf:file={home}"}
    own = CallFacts(
        fingerprint="0" * 16, dtype="bfloat16", settings={"placement.unet": "resident"}, workload={"height": 8}
    )
    for item in (
        replace(plain, card="0123456789abcdef", plan="a"),
        replace(plain, plan="b", facts=replace(plain.facts, settings=settings)),
        replace(plain, plan="c", facts=replace(plain.facts, settings={"compile.unet": "compile_repeated_blocks"})),
        replace(plain, plan="d", facts=replace(plain.facts, settings={"placement.text_encoder": "encode_first"})),
        call(1, facts=own, plan="e", pipeline="TheirOwnPipeline"),
        call(2),
        probe(card="0123456789abcdef", notes={"disk": f"{home}: permission denied"}, launch_seconds=1e-5),
    ):
        assert append(item) is None
    content = export_measurements()
    text = to_yaml(content)
    for word in (home, str(tmp_path), "0123456789abcdef", "TheirOwnPipeline", "permission", socket.gethostname()):
        assert word not in text
    assert not {"rows", "probes"} & {key for key, value in content.items() if getpass.getuser() in json.dumps(value)}
    assert {row["id"] for row in content["rows"]} == {"stable-diffusion-1.5-a", "stable-diffusion-1.5-a-allocated"}
    assert content["left_out"] == {
        "weights from a file": 1,
        "settings of compile": 1,
        "encoders dropped after encoding": 1,
        "no bundled profile is of this pipeline": 1,
        "measured before calls were kept with their settings": 1,
    }


def test_a_call_is_exported_once_by_its_last_measurement() -> None:
    first = measured_call()
    append(first)
    append(replace(first, measured=replace(first.measured, vram_reserved_bytes=5 * GIB)))
    reserved, allocated = export_measurements()["rows"]
    assert (reserved["gib"], reserved["metric"], allocated["metric"]) == (5, "reserved", "allocated")
    assert (reserved["seconds"], reserved["per"], reserved["strategy"]) == (0.1, "step", "model_cpu_offload")
    assert reserved["card"] == "rtx-4090"
    assert yaml.safe_load(to_yaml(reserved))["workload"]["num_inference_steps"] == 20


def test_other_models_under_the_same_settings_are_other_calls() -> None:
    first = measured_call()
    assert first.facts is not None
    append(first)
    append(replace(first, facts=replace(first.facts, fingerprint="0" * 16)))
    content = export_measurements()
    assert len(content["rows"]) == 2
    assert content["left_out"] == {"no bundled profile is of this pipeline": 1}


def test_facts_survive_the_store() -> None:
    record = measured_call()
    assert from_line(to_line(record)) == record
    assert record.facts is not None
    assert record.facts.settings["placement.unet"] == "model_cpu_offload"
