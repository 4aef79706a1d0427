"""What applying a plan did and what its call took, for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vramplan.units import format_bytes, format_seconds
from vramplan.view.plan import plan_rows
from vramplan.view.shared import notes_view, table_view

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vramplan.api.run import RunResult
    from vramplan.calibration.measured import Measured
    from vramplan.planfile.types import Plan

# What a plan says of its price, where there is a call to hold against it.
_PROJECTED = ("fits", "loading", "speed")


def apply_view(ran: RunResult) -> RenderableType:
    """What was applied and how near the limit its call came, projected against measured; then the calls."""
    from vramplan.view.bars import plan_bar, versus_bars
    from vramplan.view.terminal import hang, stacked

    views = [hang(f"{name:<9} {text}", 10) for name, text in _rows(ran)]
    if ran.took is None:
        bar = plan_bar(ran.plan)
        views += ["", bar] if bar else []
    else:
        for part in versus_bars(ran.plan, ran.took):
            views += ["", part]
        views += ["", measured_view(ran.plan, ran.took)]
    views += ["", "applied to the pipeline", *(hang(f"  {call}", 2) for call in ran.calls), *notes_view(ran.notes)]
    return stacked(views)


def _rows(ran: RunResult) -> Iterator[tuple[str, str]]:
    rows = plan_rows(ran.plan)
    if ran.took is None:
        yield from rows
        return
    yield from rows[:4]
    yield "took", _took(ran.plan, ran.took)
    yield from (("wrote", str(path)) for path in ran.written)
    yield from (row for row in rows[4:] if row[0] not in _PROJECTED)


def _took(plan: Plan, measured: Measured) -> str:
    """How near the limit the call came: `10.00 GiB of 10.73 GiB VRAM and 40.00 GiB of 64.00 GiB RAM, 70 s`."""
    budget = plan.machine.budget
    parts = [f"{format_bytes(measured.ram_bytes)} of {format_bytes(budget.ram_bytes)} RAM"]
    if measured.vram_reserved_bytes is not None and budget.vram_bytes is not None:
        parts.insert(0, f"{format_bytes(measured.vram_reserved_bytes)} of {format_bytes(budget.vram_bytes)} VRAM")
    return f"{' and '.join(parts)}, {format_seconds(measured.seconds)}"


def measured_text(plan: Plan, measured: Measured) -> str:
    """Projected against measured, side by side, as plain text."""
    from vramplan.view.terminal import as_text

    return as_text(measured_view(plan, measured))


def measured_view(plan: Plan, measured: Measured) -> RenderableType:
    """Projected against measured, side by side; what was not measured is no row."""
    return table_view(("", "projected", "measured", "difference"), list(_versus(plan, measured)))


def _versus(plan: Plan, measured: Measured) -> Iterator[tuple[str, str, str, str]]:
    demand = plan.projected
    sizes = [
        ("VRAM reserved", demand.vram_reserved_bytes, measured.vram_reserved_bytes),
        ("VRAM allocated", demand.vram_allocated_bytes, measured.vram_allocated_bytes),
        *_phases(plan, measured),
        ("RAM", demand.ram_bytes, measured.ram_bytes),
    ]
    for name, projected, took in sizes:
        if took is not None:
            difference = f"{(projected - took) / took:+.1%}" if took else ""
            yield name, format_bytes(projected), format_bytes(took), difference
    times = [
        ("a step", demand.seconds_per_step, measured.seconds_per_step),
        ("a call", demand.seconds_per_call, measured.seconds),
    ]
    for name, expected, seconds in times:
        if seconds is not None:
            yield name, format_seconds(expected), format_seconds(seconds), ""


def _phases(plan: Plan, measured: Measured) -> Iterator[tuple[str, int, int]]:
    """The highest moment of each phase that was told apart."""
    for name, peak in measured.phases.items():
        projected = [phase.allocated_bytes for phase in plan.projected.phases if phase.name == name]
        if projected:
            yield f"  {name}", max(projected), peak.allocated_bytes
