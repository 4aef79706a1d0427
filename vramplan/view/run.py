"""Text for a person on an applied plan and its measured call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vramplan.units import format_bytes, format_seconds
from vramplan.view.plan import plan_rows, times_text
from vramplan.view.shared import notes_view, table_view

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vramplan.api.run import RunResult
    from vramplan.calibration.peaks import Measured
    from vramplan.planfile.types import Plan

# The rows of a plan's projection, left out when a measured call replaces them.
_PROJECTED = ("fits", "loading", "speed")


def apply_view(ran: RunResult) -> RenderableType:
    """The applied plan, the call's usage against the limits, projected next to measured; then diffusers' calls."""
    from vramplan.view.bars import comparison_bars, plan_bar
    from vramplan.view.terminal import hang, stack

    views = [hang(f"{name:<9} {text}", 10) for name, text in _rows(ran)]
    if ran.measured is None:
        bar = plan_bar(ran.plan)
        views += ["", bar] if bar else []
    else:
        for part in comparison_bars(ran.plan, ran.measured):
            views += ["", part]
        views += ["", measured_view(ran.plan, ran.measured)]
    views += ["", "applied to the pipeline", *(hang(f"  {call}", 2) for call in ran.calls), *notes_view(ran.notes)]
    return stack(views)


def _rows(ran: RunResult) -> Iterator[tuple[str, str]]:
    rows = plan_rows(ran.plan)
    if ran.measured is None:
        yield from rows
        return
    yield from rows[:4]
    yield "took", _usage_text(ran.plan, ran.measured)
    yield from (("wrote", str(path)) for path in ran.written)
    yield from (row for row in rows[4:] if row[0] not in _PROJECTED)


def _usage_text(plan: Plan, measured: Measured) -> str:
    """The call's usage against the limits: `10.00 GiB of 10.73 GiB VRAM and 40.00 GiB of 64.00 GiB RAM, 70 s`."""
    budget = plan.machine.budget
    parts = [f"{format_bytes(measured.ram_bytes)} of {format_bytes(budget.ram_bytes)} RAM"]
    if measured.vram_reserved_bytes is not None and budget.vram_bytes is not None:
        parts.insert(0, f"{format_bytes(measured.vram_reserved_bytes)} of {format_bytes(budget.vram_bytes)} VRAM")
    return f"{' and '.join(parts)}, {format_seconds(measured.seconds)}"


def measured_text(plan: Plan, measured: Measured) -> str:
    """A table of projected and measured usage, as plain text."""
    from vramplan.view.terminal import as_text

    return as_text(measured_view(plan, measured))


def measured_view(plan: Plan, measured: Measured) -> RenderableType:
    """A table of projected and measured usage, with a row for each measured value."""
    return table_view(("", "projected", "measured", "difference"), list(_comparison_rows(plan, measured)))


def _comparison_rows(plan: Plan, measured: Measured) -> Iterator[tuple[str, str, str, str]]:
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
    step, call = times_text(demand)
    times = [
        ("a step", step, measured.seconds_per_step),
        ("a call", call, measured.seconds),
    ]
    for name, expected, seconds in times:
        if seconds is not None:
            yield name, expected, format_seconds(seconds), ""


def _phases(plan: Plan, measured: Measured) -> Iterator[tuple[str, int, int]]:
    """The projected and measured peak of each phase that was measured separately, in bytes."""
    for name, peak in measured.phases.items():
        projected = [phase.allocated_bytes for phase in plan.projected.phases if phase.name == name]
        if projected:
            yield f"  {name}", max(projected), peak.allocated_bytes
