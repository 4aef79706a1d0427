"""A simulation as text and JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from vramplan.units import format_bytes
from vramplan.view.shared import _NUMERIC, blocks_row, notes_view

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vramplan.simulator.types import Simulation

SIMULATE_SCHEMA_VERSION = 1


def simulation_dict(simulation: Simulation) -> dict[str, Any]:
    """A simulation as an object for programs."""
    content = asdict(replace(simulation, timeline=None))
    content.pop("timeline")  # only for pictures
    return {"schema_version": SIMULATE_SCHEMA_VERSION, **content}


def text_of(simulation: Simulation) -> str:
    """A simulation for a person, as plain text."""
    from vramplan.view.terminal import as_text

    return as_text(simulation_view(simulation))


def html_of(simulation: Simulation) -> str:
    """A simulation for a notebook, with the picture of its memory over the call."""
    from vramplan.view.plot.save import picture_html
    from vramplan.view.terminal import as_html

    return as_html(simulation_view(simulation)) + picture_html(simulation)


def _host_lines(simulation: Simulation) -> Iterator[str]:
    """RAM as in a plan, and apart from it pages of files and what is kept on disk."""
    ram, pinned = simulation.ram_bytes, simulation.pinned_bytes
    if ram is None or pinned is None:
        yield f"RAM       {format_bytes(simulation.host_peak_bytes)}, pages of files included"
        return
    yield f"RAM       {format_bytes(ram)}, of which {format_bytes(pinned)} page-locked"
    if simulation.disk_bytes:
        yield f"disk      {format_bytes(simulation.disk_bytes)} in files of the plan's own"


def simulation_view(simulation: Simulation) -> RenderableType:
    """A simulation for a person: whether it fits, the peaks, and the operation at each peak."""
    from vramplan.view.bars import simulation_bar
    from vramplan.view.terminal import hang, stack, table

    limit = "" if simulation.capacity_bytes is None else f" of {format_bytes(simulation.capacity_bytes)}"
    verdict = {None: "no limit was set", True: "fits", False: "does not fit"}[simulation.fits]
    lines = [
        f"VRAM      {format_bytes(simulation.peak_reserved_bytes)} reserved{limit}, "
        f"{format_bytes(simulation.peak_allocated_bytes)} allocated: {verdict}",
        *_host_lines(simulation),
        *(f"{name:9} {text}" for name, text in blocks_row(simulation.phases)),
        f"moved     {format_bytes(simulation.to_device_bytes)} to the device, "
        f"{format_bytes(simulation.to_host_bytes)} back, in {simulation.steps} steps",
        f"simulated {simulation.operations} operations in {simulation.wall_seconds:.1f} s",
    ]
    rows = [
        (
            phase.name,
            format_bytes(phase.peak_allocated_bytes),
            format_bytes(phase.weights_bytes),
            format_bytes(phase.activation_bytes),
            format_bytes(phase.workspace_bytes),
            f"{phase.module or 'the pipeline'}: {phase.operation}" if phase.operation else "moving weights",
        )
        for phase in simulation.phases
    ]
    header = ("phase", "peak", "weights", "activations", "workspace", "made by")
    return stack(
        [
            *(hang(line, 10) for line in lines),
            "",
            simulation_bar(simulation),
            "",
            table(header, rows, _NUMERIC),
            *notes_view(simulation.notes),
        ]
    )
