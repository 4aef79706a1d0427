"""What people see: each view at 80 and 120 columns, with and without colours and Unicode.

`VRAMPLAN_SNAPSHOTS=write` writes tests/view/snapshots anew; look at the difference before it is kept.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from rich.text import Text

from vramplan.api.run import RunResult
from vramplan.calibration.peaks import Measured, Peak
from vramplan.fitting.types import Fits, Row, Smallest
from vramplan.hardware.types import Accelerator, Budget, Deduction, Hardware, Host
from vramplan.planfile.file import load_plan
from vramplan.planfile.record import projected
from vramplan.planfile.types import Plan
from vramplan.simulator.types import Simulation
from vramplan.units import GIB, MIB, format_bytes
from vramplan.view.fits import fits_view
from vramplan.view.machine import hardware_view
from vramplan.view.plan import explain_view, plan_view
from vramplan.view.run import apply_view
from vramplan.view.simulation import simulation_view
from vramplan.view.terminal import _AsciiBuffer, _console, as_html, as_text, show

FOLDER = Path(__file__).parent / "snapshots"
PLAN = load_plan(FOLDER / "plan.yaml")
SIMULATION = TypeAdapter(Simulation).validate_json((FOLDER / "simulation.json").read_bytes(), strict=True)
CARD = Accelerator(kind="cuda", index=0, name="made-up card", total_bytes=8 * GIB, free_bytes=7 * GIB, driver="1.2.3")
HOST = Host(total_bytes=32 * GIB, available_bytes=30 * GIB, limit_bytes=16 * GIB, limit_source="cgroup")
BUDGET = Budget(
    vram_bytes=6 * GIB,
    ram_bytes=15 * GIB,
    deductions=(
        Deduction(
            memory="vram", name="driver context", size_bytes=512 * MIB, reason="what a process takes when it first asks"
        ),
        Deduction(memory="vram", name="margin", size_bytes=512 * MIB, reason="kept free on purpose"),
        Deduction(memory="ram", name="reserve", size_bytes=GIB, reason="kept free for the system and this program"),
    ),
)
ROW = Row(
    model="flux.1-dev",
    workload=PLAN.workload,
    device="rtx-4070",
    memory_bytes=12 * GIB,
    alike=("rtx-3060", "rtx-5070"),
    fits=True,
    settings=PLAN.settings,
    quality=PLAN.quality,
    projected=projected(PLAN.projected),
)
FITS = Fits(
    question="cards",
    asked=PLAN.asked,
    fits=True,
    rows=(replace(ROW, device="gtx-1650", memory_bytes=4 * GIB, fits=False, reason="short by 1.66 GiB"), ROW),
    smallest=(
        Smallest(model=ROW.model, allow="lossless", row=ROW, least_vram_bytes=5 * GIB),
        Smallest(model=ROW.model, allow="lossy", row=None, least_vram_bytes=None),
    ),
)
TAKEN = {item.name: item.size_bytes for item in PLAN.machine.budget.deductions if item.memory == "vram"}
TOOK = Measured(
    seconds=70.0,
    seconds_per_step=2.5,
    vram_allocated_bytes=9 * GIB,
    vram_reserved_bytes=10 * GIB,
    ram_bytes=40 * GIB,
    phases={
        "encode": Peak(allocated_bytes=6 * GIB, reserved_bytes=7 * GIB),
        "denoise": Peak(allocated_bytes=8 * GIB, reserved_bytes=9 * GIB),
        "decode": Peak(allocated_bytes=9 * GIB, reserved_bytes=10 * GIB),
    },
)
RAN = RunResult(
    plan=PLAN,
    calls=(
        'pipe.transformer.enable_group_offload(onload_device=torch.device("cuda:0"), '
        'offload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=True)',
        'pipe.vae.to("cuda:0")',
    ),
    notes=("weights are pinned on the fly",),
    written=(Path("panda.png"),),
    measured=TOOK,
)
VIEWS = {
    "plan": plan_view(PLAN),
    "explain": explain_view(PLAN),
    "simulate": simulation_view(SIMULATION),
    "apply": apply_view(RAN),
    "applied": apply_view(
        replace(RAN, measured=None, written=(), notes=(*RAN.notes, "nothing generated: give `prompt`"))
    ),
    "fit": fits_view(FITS),
    "detect": hardware_view(Hardware(accelerators=(CARD,), host=HOST, notes=("a note",)), BUDGET),
}
LOOKS = {"colour": (StringIO, "truecolor"), "plain": (StringIO, None), "ascii": (_AsciiBuffer, None)}


def shown(name: str, columns: int, look: str) -> str:
    made, colours = LOOKS[look]
    out = made()
    _console(out, columns, color_system=colours, force_terminal=True).print(VIEWS[name])
    return out.getvalue()


def is_kept(name: str, text: str) -> bool:
    path = FOLDER / f"{name}.txt"
    if os.environ.get("VRAMPLAN_SNAPSHOTS") == "write":
        path.write_text(text, encoding="utf-8", newline="\n")
    return path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", VIEWS)
def test_every_view_is_as_it_was_looked_at(name: str, columns: int, look: str) -> None:
    text = shown(name, columns, look)
    assert is_kept(f"{name}-{columns}-{look}", text)
    assert max(len(line.rstrip()) for line in Text.from_ansi(text).plain.split("\n")) <= columns
    assert ("\x1b[" in text) == (look == "colour")
    assert text.isascii() or look != "ascii"


@pytest.mark.parametrize("name", VIEWS)
def test_a_wider_terminal_is_used(name: str) -> None:
    widest = [max(len(line.rstrip()) for line in shown(name, columns, "plain").split("\n")) for columns in (80, 120)]
    assert widest[1] > widest[0]


@pytest.mark.parametrize("name", VIEWS)
def test_through_a_pipe_each_thing_is_one_line_of_plain_ascii(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    text = as_text(VIEWS[name])
    assert text.isascii()
    assert "\x1b" not in text
    if name == "explain":
        assert all(f"{'':9}{item.reason}" in text.splitlines() for item in PLAN.candidates)


class _Terminal(StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_only_where_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], coloured: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in ({"TERM": "xterm-256color", "COLUMNS": "80"} | variables).items():
        monkeypatch.setenv(name, value)
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    show(VIEWS["simulate"])
    assert ("\x1b[38;" in terminal.getvalue()) == coloured
    assert "█" in terminal.getvalue()


def test_a_bar_has_every_part_and_its_length_is_that_of_the_line() -> None:
    line = next(line for line in shown("plan", 80, "ascii").split("\n") if line.startswith("VRAM ["))
    assert len(line.rstrip()) <= 80
    assert all(mark in line for mark in "#+~:.mcx")
    most, least = line.count("#"), line.count("m")
    assert most > 10 * least > 0


def test_measured_and_projected_are_on_one_scale() -> None:
    bars = [line for line in shown("apply", 80, "ascii").split("\n") if line.startswith(("projected [", "measured  ["))]
    (projected, measured) = bars
    assert len(projected.rstrip()) == len(measured.rstrip()) <= 80
    assert projected.count("x") == measured.count("x") > 0
    assert measured.count(".") > projected.count(".") > 0  # it took less than was projected


def test_a_call_that_took_more_than_was_planned_goes_into_the_margin() -> None:
    limit = PLAN.machine.budget.vram_bytes + 50 * MIB
    over = replace(RAN, measured=replace(TOOK, vram_reserved_bytes=limit))
    text = as_text(apply_view(over))
    measured = text[text.index("measured  [") : text.index("VRAM reserved")]
    assert "headroom" not in measured
    assert f"m margin {format_bytes(TAKEN['margin'] - 50 * MIB)}" in measured


@pytest.mark.parametrize("shown_value", [PLAN, SIMULATION, Hardware(accelerators=(CARD,), host=HOST)])
def test_a_notebook_shows_the_same_words(shown_value: Plan | Simulation | Hardware) -> None:
    html = shown_value._repr_html_()
    assert html.startswith("<pre")
    views = {Simulation: "simulate", Hardware: "detect"}
    words = {Simulation: "kept by torch 1.75 GiB", Hardware: "made-up card"}
    assert words.get(type(shown_value), "weight_streaming") in html
    assert as_html(VIEWS[views.get(type(shown_value), "plan")]).startswith("<pre")
