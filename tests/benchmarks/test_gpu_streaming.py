"""`benchmarks/gpu_streaming.py` as it runs on a card, with small pipelines on the CPU in its place."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_streaming
from gpu_streaming import Bench, leaves_of, main, run_case
from gpu_streaming_cases import SDXL, VIDEO, Case, cases, derived
from gpu_streaming_machine import Copies, Pretend

from tests.support.fake_accelerator import FakeAccelerator
from vramplan.streaming import backend
from vramplan.streaming.backend import TorchBackend
from vramplan.units import MIB

# One of each kind: two of one differ in their numbers alone. Of the model whose small pipeline is called fastest.
KINDS = {
    "": ("resident", "leaf", "sequential", "planned", "stock plan"),
    "locked": ("blocks", "leaves", "half", "whole"),
    "pageable": ("blocks",),
    "file": ("blocks",),
}
CHOSEN = [Case(model=VIDEO, form=form, host=host) for host, forms in KINDS.items() for form in forms]
# Refused without a card.
FAILING = {f"{VIDEO} sequential"}

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def invoke(*options: str) -> str:
        found = CliRunner().invoke(main, ["-o", str(tmp_path / "found.json"), *options], catch_exceptions=False)
        assert found.exit_code == 0
        return found.output

    return invoke


def test_cases_of_every_kind_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "found.json"
    monkeypatch.setattr(gpu_streaming, "cases", lambda: CHOSEN)
    printed = run("--pretend")
    found = json.loads(file.read_text())
    assert list(found["cases"]) == [case.name for case in CHOSEN]
    assert {name for name, row in found["cases"].items() if "error" in row} == FAILING
    for case in CHOSEN:
        row, figures = found["cases"][case.name], found["figures"][case.name]
        if case.name not in FAILING:
            assert figures["equal"], case.name
            assert len(row["step_seconds"]) == len(row["streamed_bytes_per_step"]) == 3
            assert set(row["phases"]) == {"encode", "denoise", "decode"}
            assert ("simulated" in row) == (case.form not in ("planned", "stock plan"))
            assert (figures.get("link_share") is not None) == case.streams
    streamed = {case.form: found["cases"][case.name] for case in CHOSEN if case.host == "locked"}
    assert max(streamed["whole"]["streamed_bytes_per_step"]) == 0
    assert min(streamed["leaves"]["streamed_bytes_per_step"]) > 0
    assert "DIFFERENT" not in printed
    # started again, nothing is left to do; without time, nothing is lost
    assert "minutes left" not in run("--pretend")
    run("--pretend", "--minutes", "0")
    assert json.loads(file.read_text())["cases"] == found["cases"]
    del found["cases"][f"{VIDEO} blocks file"]["simulated"]
    file.write_text(json.dumps(found))
    assert "blocks file simulated" in run("--simulate", "--minutes", "0", "--only", "file")


def test_other_bits_are_told(tmp_path: Path) -> None:
    bench = Bench(Pretend(), tmp_path)
    case = Case(model=VIDEO, form="whole", host="pageable")
    run_case(case, bench)
    latents, pictures = bench.expected[VIDEO]
    for expected, equal in (([latents, b""], (True, False)), ([b"", pictures], (False, True))):
        bench.expected[VIDEO] = expected
        row = run_case(case, bench)
        assert (row["latents_equal"], row["pictures_equal"]) == equal


def test_one_broken_case_costs_no_other(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case, bench: Bench) -> dict[str, Any]:
        raise ValueError(case.form)

    monkeypatch.setattr(gpu_streaming, "run_case", broken)
    printed = run("--pretend", "--only", f"{SDXL} whole")
    rows = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert list(rows.values()) == [{"error": "ValueError: whole"}] * 3  # one of each host
    assert "ValueError: whole" in printed


def test_figures_follow_from_what_was_measured() -> None:
    phase = {"allocated": 100 * MIB, "reserved": 128 * MIB}
    row = {
        "phases": {"encode": phase, "denoise": {"allocated": 60 * MIB, "reserved": 64 * MIB}},
        "step_seconds": [2.1, 2.0, 9.0],
        "streamed_bytes_per_step": [200, 200, 200],
        "call_seconds": 20.0,
        "apply_seconds": 4.0,
        "undo_seconds": 1.0,
        "locked_bytes": 202,
        "denoiser_bytes": 300,
        "copy_bytes_per_s": 95.0,
        "bare_bytes_per_s": 100.0,
        "latents_equal": True,
        "pictures_equal": False,
        "simulated": {"peak_allocated_bytes": 110 * MIB},
    }
    case, resident = Case(model=SDXL, form="blocks", host="locked"), Case(model=SDXL, form="resident")
    found = {"link": {"pinned_to_device": {"best": 50.0}}, "cases": {case.name: row}}
    found["cases"][resident.name] = row | {"step_seconds": [1.0, 1.0, 1.0]}
    figures = derived(case, found)
    assert figures["step_against_bound"] == pytest.approx(2.1 / 2.0)  # bound by copying 200 at 100 per second
    assert figures["equal"] is False
    assert figures["link_share"] == pytest.approx(0.95)
    assert figures["locked_against_streamed"] == pytest.approx(1.01)
    assert figures["projected_error"] == pytest.approx(0.1)
    found["cases"][resident.name]["step_seconds"] = [4.0, 4.0, 4.0]
    assert derived(case, found)["step_against_bound"] == pytest.approx(2.1 / 4.0)
    planned = Case(model=SDXL, form="planned")
    found["cases"][planned.name] = row | {"budget_bytes": 90 * MIB, "projected_peak_bytes": 64 * MIB}
    found["cases"][planned.name]["decode"] = ["vae_tiling:tile=256"]
    assert derived(planned, found)["equal"] is True
    assert derived(planned, found)["idle_in_denoise_bytes"] == 30 * MIB
    assert derived(planned, found)["projected_error"] == pytest.approx(-0.5)
    block = Case(model=SDXL, form="block")
    found["cases"][block.name] = {key: value for key, value in row.items() if key != "bare_bytes_per_s"}
    assert derived(block, found)["step_against_bound"] == pytest.approx(2.1 / 6.0)  # all 300 at the link's 50


def test_copies_are_counted_and_timed_on_the_stream_they_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """With streams, as on a card: those that a thread makes too."""
    accelerator = FakeAccelerator()
    monkeypatch.setattr(backend, "torch", accelerator)
    monkeypatch.setattr(backend, "backend_for", TorchBackend)
    device = Pretend()
    marked: list[Any] = []
    monkeypatch.setattr(device, "mark", lambda stream: marked.append(stream) or float(len(marked)))
    copies = Copies(device)
    with copies.watching():
        engine = backend.backend_for(torch.device("cpu"))
    buffer, chunk = engine.allocate(1024, "vae"), engine.page_lock(1024, "vae")
    engine.copy(buffer, [(chunk, 0, 0, 300), (chunk, 512, 512, 100)])
    engine.compute_after(engine.gather(buffer, [(0, torch.ones(50, dtype=torch.uint8))]))
    assert (copies.streamed_bytes, copies.locked_bytes) == (450, 1024)
    assert [(kind, size) for kind, size, *_ in copies.timed] == [("copy", 400), ("gather", 50)]
    assert (copies.rate("copy"), copies.rate("gather")) == (400, 50)
    side, copier = engine._side, engine._copier_side  # type: ignore[attr-defined]
    assert marked == [side, side, copier, copier]


def test_every_model_has_a_resident_case_first_and_every_case_a_name() -> None:
    found = cases()
    assert len({case.name for case in found}) == len(found)
    for model in {case.model for case in found}:
        assert next(case for case in found if case.model == model).form == "resident"


def test_leaves_are_what_has_weights_and_no_children() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 2)))
    assert leaves_of(net) == [net[0], net[1][1]]
