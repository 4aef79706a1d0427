"""Pictures of simulations and plans, and the timeline they are drawn from."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from pydantic import TypeAdapter

import vramplan
from vramplan.calibration.peaks import Measured, Peak
from vramplan.calibration.records import CallRecord, Usage
from vramplan.calibration.store import append
from vramplan.cli.main import main
from vramplan.errors import UsageError, VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.planfile.types import Plan
from vramplan.runtime.recording import last_measured, record_of
from vramplan.simulator.allocator import CachingAllocator
from vramplan.simulator.ledger import Block, Ledger
from vramplan.simulator.timeline import TimelineRecorder
from vramplan.simulator.types import Simulation
from vramplan.units import GIB, MIB
from vramplan.view.plot.candidates import candidates_picture
from vramplan.view.plot.memory import memory_picture
from vramplan.view.plot.save import picture_html, save_picture

CARD = Accelerator(kind="cuda", index=0, name="made-up card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))
SIZE = {"height": 64, "width": 64, "steps": 2}


@pytest.fixture(scope="module")
def plan(small_folder: Callable[[str], Path]) -> Plan:
    return vramplan.plan(str(small_folder("sd15-small")), device=MACHINE, simulate=False, **SIZE)


@pytest.fixture(scope="module", params=["resident", "model_cpu_offload"])
def simulation(request: Any, small_folder: Callable[[str], Path]) -> Simulation:
    folder, settings = str(small_folder("sd15-small")), {"placement": request.param}
    made = vramplan.plan(folder, device=MACHINE, simulate=False, settings=settings, **SIZE)
    return vramplan.simulate(folder, made, capacity_bytes=GIB, timeline=True)


class TestTimeline:
    def test_no_peak_is_lost(self, simulation: Simulation) -> None:
        moments = simulation.timeline.moments
        for phase in simulation.phases:
            assert any(
                (moment.allocated_bytes, sum(moment.weights_bytes), moment.module, moment.operation)
                == (phase.peak_allocated_bytes, phase.weights_bytes, phase.module, phase.operation)
                for moment in moments
                if moment.phase == phase.name
            )
        assert max(moment.allocated_bytes for moment in moments) == simulation.peak_allocated_bytes
        assert max(moment.reserved_bytes for moment in moments) == simulation.peak_reserved_bytes
        assert max(moment.host_bytes for moment in moments) == simulation.host_peak_bytes

    def test_weights_belong_to_their_components(self, simulation: Simulation, plan: Plan) -> None:
        timeline = simulation.timeline
        most = {
            name: max(moment.weights_bytes[place] for moment in timeline.moments)
            for place, name in enumerate(timeline.components)
        }
        for record in plan.model.components:
            if most.get(record.name):  # small tensors are rounded up to 512 bytes
                assert record.weight_bytes <= most[record.name] <= record.weight_bytes * 1.5 + MIB
        assert {"unet", "vae", "text_encoder"} <= {name for name, size in most.items() if size}

    def test_it_changes_nothing_and_is_there_only_where_it_was_asked_for(self, plan: Plan) -> None:
        plain, timed = (vramplan.simulate(plan.model.source, plan, timeline=told) for told in (False, True))
        assert plain.timeline is None
        same = replace(timed, timeline=None, wall_seconds=plain.wall_seconds)
        assert same == plain

    def test_it_is_kept_with_the_simulation(self, simulation: Simulation) -> None:
        kept = json.dumps(asdict(simulation))
        assert TypeAdapter(Simulation).validate_json(kept, strict=True) == simulation

    def test_a_long_call_is_bounded_and_a_single_tick_still_seen(self) -> None:
        recorder = TimelineRecorder(most=16)
        ledger = Ledger(CachingAllocator(), recorder.note)
        for number in range(10_000):
            ledger.phase = "decode" if number == 7_777 else "denoise"
            Block(ledger, 50 * MIB if number == 3_333 else MIB, "device", "activation")
        found = recorder.timeline()
        assert found.ticks == 20_000
        assert len(found.moments) <= 4 * 16
        assert max(moment.allocated_bytes for moment in found.moments) == 50 * MIB
        decode = [moment for moment in found.moments if moment.phase == "decode"]
        assert max(moment.allocated_bytes for moment in decode) == MIB


class TestWhatIsShown:
    def test_phases_fill_the_width_in_order(self, simulation: Simulation) -> None:
        picture = memory_picture(simulation)
        assert [span.name for span in picture.phases] == ["load", "encode", "denoise", "decode"]
        assert picture.phases[0].start == 0
        assert picture.phases[-1].end == pytest.approx(1)
        assert list(picture.places) == sorted(picture.places)
        assert 0 <= picture.places[0] <= picture.places[-1] <= 1

    def test_the_stack_is_what_is_allocated_and_the_peak_is_named(self, simulation: Simulation) -> None:
        picture = memory_picture(simulation)
        stack = [sum(sizes) for sizes in zip(*(layer.sizes for layer in picture.device), strict=True)]
        assert max(stack) == pytest.approx(simulation.peak_allocated_bytes / GIB)
        assert picture.peak == pytest.approx(max(stack))
        highest = max(simulation.phases, key=lambda phase: phase.peak_allocated_bytes)
        assert picture.peak_name.endswith(highest.module)
        assert picture.budget == 1.0

    def test_no_two_layers_look_alike(self, simulation: Simulation) -> None:
        layers = memory_picture(simulation).device
        assert len({layer.colour for layer in layers}) == len({layer.name for layer in layers}) == len(layers)

    def test_every_candidate_is_a_dot(self, plan: Plan) -> None:
        picture = candidates_picture(plan)
        assert sum(len(group.times) for group in picture.groups) == len(plan.candidates)
        assert [len(group.times) for group in picture.groups if group.name == "chosen"] == [1]

    def test_without_an_accelerator_ram_is_what_is_shown(self, plan: Plan) -> None:
        vramless = replace(plan.machine, budget=replace(plan.machine.budget, vram_bytes=None), accelerator=None)
        picture = candidates_picture(replace(plan, machine=vramless))
        chosen = next(group for group in picture.groups if group.name == "chosen")
        assert (picture.memory, picture.budget) == ("RAM", plan.machine.budget.ram_bytes / GIB)
        assert chosen.sizes == [plan.projected.ram_bytes / GIB]

    def test_nothing_to_draw_is_said(self, simulation: Simulation, plan: Plan) -> None:
        with pytest.raises(VramplanError, match="timeline=True"):
            memory_picture(replace(simulation, timeline=None))
        with pytest.raises(VramplanError, match="no candidates"):
            candidates_picture(replace(plan, candidates=()))


def took(plan: Plan, **changes: Any) -> CallRecord:
    """A call under this plan that took a quarter of a gigabyte, most of it while decoding."""
    found = Measured(
        seconds=2.0,
        vram_allocated_bytes=192 * MIB,
        vram_reserved_bytes=256 * MIB,
        ram_bytes=GIB,
        phases={
            "encode": Peak(allocated_bytes=32 * MIB, reserved_bytes=64 * MIB),
            "denoise": Peak(allocated_bytes=64 * MIB, reserved_bytes=128 * MIB),
            "decode": Peak(allocated_bytes=192 * MIB, reserved_bytes=256 * MIB),
        },
    )
    return replace(record_of(SimpleNamespace(plan=plan), found), **changes)


class TestMeasured:
    def test_each_phase_has_its_own_height_on_the_simulations_axes(self, simulation: Simulation, plan: Plan) -> None:
        picture = memory_picture(simulation, took(plan).measured)
        reserved, allocated = picture.measured_device
        spans = {span.name: span for span in picture.phases}
        assert [level.name for level in picture.measured_device] == [
            "measured: reserved 0.25 GiB",
            "measured: allocated 0.19 GiB",
        ]
        heights = dict(zip(reserved.places, zip(reserved.sizes, allocated.sizes, strict=True), strict=False))
        assert reserved.places[0] == spans["encode"].start
        assert reserved.places[-1] == spans["decode"].end
        assert reserved.sizes == pytest.approx([0.0625, 0.0625, 0.125, 0.125, 0.25, 0.25])
        assert heights[spans["decode"].end] == pytest.approx((0.25, 0.1875))
        assert (reserved.highest, allocated.highest) == pytest.approx((0.25, 0.1875))
        (ram,) = picture.measured_host
        assert (ram.places, ram.sizes) == ([0, 1], [1.0, 1.0])

    def test_a_phase_that_was_not_measured_is_a_gap(self, simulation: Simulation, plan: Plan) -> None:
        whole = took(plan).measured
        phases = {name: peak for name, peak in whole.phases.items() if name != "denoise"}
        level, _ = memory_picture(simulation, replace(whole, phases=phases)).measured_device
        assert level.sizes == [0.0625, 0.0625, None, 0.25, 0.25]
        assert level.places[2] is None

    def test_where_only_the_call_was_measured_it_is_one_line(self, simulation: Simulation, plan: Plan) -> None:
        level, _ = memory_picture(simulation, replace(took(plan).measured, phases={})).measured_device
        assert (level.places, level.sizes) == ([0, 1], [0.25, 0.25])
        on_cpu = Usage(
            vram_allocated_bytes=None, vram_reserved_bytes=None, ram_bytes=GIB, seconds_per_step=None,
            seconds_per_call=1.0,
        )  # fmt: skip
        assert memory_picture(simulation, on_cpu).measured_device == []

    def test_it_is_the_last_call_of_these_settings_this_size_and_this_card(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan: Plan
    ) -> None:
        monkeypatch.setenv("VRAMPLAN_CALIBRATION", str(tmp_path))
        assert last_measured(plan) is None
        for record in (took(plan, time="first"), took(plan, time="last")):
            assert append(record) is None
        for changes in ({"device": "x"}, {"plan": "x"}, {"pipeline": "x"}):
            assert append(replace(took(plan, time="another"), **changes)) is None
        found = last_measured(plan)
        assert found == took(plan, time="last")
        assert last_measured(replace(plan, workload=replace(plan.workload, height=128))) is None

    def test_measurements_outlive_a_nicer_wording_and_those_that_have_the_words_alone_are_found_by_them(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan: Plan
    ) -> None:
        monkeypatch.setenv("VRAMPLAN_CALIBRATION", str(tmp_path))
        old = replace(took(plan, time="before records had a plan"), plan="")
        for record in (old, replace(old, settings="x"), replace(old, shape="x")):
            assert append(record) is None
        assert last_measured(plan) == old
        assert append(took(plan, time="now")) is None
        monkeypatch.setattr("vramplan.runtime.recording.settings_text", lambda settings: "in nicer words")
        found = last_measured(plan)
        assert found is not None
        assert found.time == "now"

    @pytest.mark.parametrize("form", ["svg", "html"])
    def test_the_command_draws_it(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan: Plan, form: str) -> None:
        monkeypatch.setenv("VRAMPLAN_CALIBRATION", str(tmp_path))
        path, plain, drawn = tmp_path / "plan.yaml", tmp_path / f"plain.{form}", tmp_path / f"drawn.{form}"
        path.write_text(vramplan.dump_plan(plan), encoding="utf-8")
        for picture in (plain, drawn):
            for command in ("simulate", "explain"):
                done = CliRunner().invoke(main, [command, str(path), "--plot", str(picture.with_stem(command))])
                assert done.exit_code == 0, done.stderr
                text = picture.with_stem(command).read_text(encoding="utf-8")
                word = {"simulate": "measured: reserved 0.25 GiB", "explain": "the chosen one, measured"}[command]
                assert (word in text) == (picture is drawn)
            append(took(plan))


class TestFiles:
    @pytest.mark.parametrize("form", ["svg", "png"])
    def test_matplotlib_writes_both_pictures(self, tmp_path: Path, simulation: Simulation, plan: Plan, form) -> None:
        pytest.importorskip("matplotlib")
        for number, value in enumerate((simulation, plan)):
            paths = [tmp_path / f"{number}{again}.{form}" for again in "ab"]
            for path in paths:
                save_picture(path, value)
            first, second = (path.read_bytes() for path in paths)
            assert first == second
            if form == "png":
                assert first.startswith(b"\x89PNG")
                continue
            words = " ".join(ElementTree.fromstring(first).itertext())
            expected = ("VRAM, GiB", "RAM, GiB", "denoise", "peak", "budget") if value is simulation else ("chosen",)
            assert all(word in words for word in expected)

    def test_html_is_one_file_that_asks_for_nothing(self, tmp_path: Path, simulation: Simulation, plan: Plan) -> None:
        pytest.importorskip("plotly")
        for value, word in ((simulation, "reserved by torch"), (plan, "too much VRAM|fits")):
            save_picture(tmp_path / "x.html", value)
            page = (tmp_path / "x.html").read_text(encoding="utf-8")
            assert re.search(word, page)
            assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page.split("plotly.js v")[0])
            assert page.count("<script") - page.count('"<script') >= 1
            assert 'name="viewport"' in page
            assert "prefers-color-scheme: dark" in page

    def test_another_form_or_folder_is_refused(self, tmp_path: Path, plan: Plan) -> None:
        with pytest.raises(UsageError, match=r"ends in \.svg, \.png, \.html"):
            save_picture(tmp_path / "x.gif", plan)
        with pytest.raises(UsageError, match="folder does not exist"):
            save_picture(tmp_path / "no" / "x.svg", plan)

    @pytest.mark.parametrize(("form", "package"), [("svg", "matplotlib"), ("html", "plotly")])
    def test_without_the_package_one_line_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan: Plan, form: str, package: str
    ) -> None:
        monkeypatch.setattr("vramplan.view.plot.save.find_spec", lambda name: None)
        path = tmp_path / "plan.yaml"
        path.write_text(vramplan.dump_plan(plan), encoding="utf-8")
        done = CliRunner().invoke(main, ["explain", str(path), "--plot", str(tmp_path / f"x.{form}")])
        assert done.exit_code == 1
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert f"needs {package}: pip install 'vramplan[plot]'" in done.stderr

    def test_the_command_writes_it_beside_what_it_prints(self, tmp_path: Path, plan: Plan) -> None:
        pytest.importorskip("matplotlib")
        path = tmp_path / "plan.yaml"
        path.write_text(vramplan.dump_plan(plan), encoding="utf-8")
        for command in ("explain", "simulate"):
            picture = tmp_path / f"{command}.svg"
            done = CliRunner().invoke(main, [command, str(path), "--json", "--plot", str(picture)])
            assert done.exit_code == 0, done.stderr
            assert "timeline" not in json.loads(done.stdout)
            assert done.stderr.endswith(f"wrote {picture}\n")
            assert picture.stat().st_size > 1000

    @pytest.mark.parametrize("form", ["svg", "png", "html"])
    def test_a_model_is_simulated_and_drawn_without_a_plan_file(
        self, tmp_path: Path, small_folder: Callable[[str], Path], form: str
    ) -> None:
        pytest.importorskip({"html": "plotly"}.get(form, "matplotlib"))
        picture = tmp_path / f"memory.{form}"
        folder = str(small_folder("sd15-small"))
        sizes = ("--height", "64", "--width", "64", "--steps", "2", "--set", "placement=model_cpu_offload")
        done = CliRunner().invoke(main, ["simulate", folder, "--device", "rtx-3060", *sizes, "--plot", str(picture)])
        assert done.exit_code == 0, done.stderr
        assert done.stdout.startswith("VRAM ")
        content = picture.read_bytes()
        starts = {"svg": b"<?xml", "png": b"\x89PNG\r\n\x1a\n", "html": b"<!DOCTYPE html>"}
        assert content.startswith(starts[form])
        assert form == "png" or all(word in content for word in (b"unet", b"decode", b"activations", b"budget"))

    def test_a_notebook_shows_the_picture_where_there_is_one(self, simulation: Simulation) -> None:
        pytest.importorskip("matplotlib")
        assert "data:image/png;base64," in simulation._repr_html_()
        assert picture_html(replace(simulation, timeline=None)) == ""


def test_without_a_picture_nothing_that_draws_is_imported() -> None:
    code = (
        "import vramplan.view.plot.save, vramplan.view.shared, sys; "
        "print({'matplotlib', 'plotly', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
