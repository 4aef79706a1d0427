"""The data of a picture of the memory over a call, independent of the drawing library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vramplan.calibration.records import Usage
from vramplan.errors import VramplanError
from vramplan.simulator.types import Moment, Simulation, Timeline
from vramplan.units import GIB, format_bytes
from vramplan.view.plot.colours import ACTIVATIONS, HOST, PINNED, WEIGHTS, WORKSPACE

# The least share of the width for a phase: a decode of few, large blocks would be too narrow to see otherwise.
_LEAST_WIDTH = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer of a stack: its sizes in GiB, one for each place."""

    name: str
    colour: str
    sizes: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A phase and its start and end in the picture, from 0 to 1."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Measured peaks in GiB, as a line: level over the whole call, or with a step for each phase.

    `places` are the ends of its segments, `sizes` the heights there; None breaks the line.
    """

    name: str
    places: Sequence[float | None]
    sizes: Sequence[float | None]

    @property
    def highest(self) -> float:
        """The greatest height, in GiB."""
        return max(size for size in self.sizes if size is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPicture:
    """Memory in GiB over places from 0 to 1, in the order of the call; phases are not to scale.

    `running` names the module that ran at each place, `peak_name` the one at the peak, at place `peak_at`. `budget` is
    None without a limit. It `stopped` if memory ran out. The `measured_...` levels are the peaks of a measured call.
    """

    title: str
    places: Sequence[float]
    running: Sequence[str]
    device: Sequence[Layer]
    reserved: Sequence[float]
    host: Sequence[Layer]
    phases: Sequence[Span]
    budget: float | None
    stopped: bool
    peak_at: float
    peak: float
    peak_name: str
    measured_device: Sequence[Level] = ()
    measured_host: Sequence[Level] = ()


def memory_picture(simulation: Simulation, measured: Usage | None = None) -> MemoryPicture:
    """The picture of a simulation, with the peaks of a measured call, if given, by phase if known.

    Raises:
        VramplanError: the simulation has no timeline.
    """
    timeline = simulation.timeline
    if timeline is None or not timeline.moments:
        raise VramplanError("this simulation has no timeline to draw: simulate with timeline=True")
    spans = _spans(timeline)
    moments = timeline.moments
    pinned = [moment.pinned_bytes / GIB for moment in moments]
    host = [(moment.host_bytes - moment.pinned_bytes) / GIB for moment in moments]
    highest = max(moments, key=lambda moment: moment.allocated_bytes)
    places = _places(moments, spans)
    return MemoryPicture(
        title=_title(simulation),
        places=places,
        running=[_running(moment) for moment in moments],
        device=_device(timeline),
        reserved=[moment.reserved_bytes / GIB for moment in moments],
        host=_non_empty(
            Layer(name="page-locked", colour=PINNED, sizes=pinned),
            Layer(name="other RAM, with pages of files", colour=HOST, sizes=host),
        ),
        phases=[span for _, span in spans],
        budget=None if simulation.capacity_bytes is None else simulation.capacity_bytes / GIB,
        peak_at=places[moments.index(highest)],
        peak=highest.allocated_bytes / GIB,
        peak_name=f"peak {format_bytes(highest.allocated_bytes)} allocated: {_running(highest)}",
        stopped=simulation.stopped is not None,
        measured_device=[] if measured is None else list(_measured_device(measured, [span for _, span in spans])),
        measured_host=[] if measured is None else [_level("RAM", measured.ram_bytes, [])],
    )


def _measured_device(measured: Usage, spans: Sequence[Span]) -> Iterator[Level]:
    """The measured peaks of reserved and allocated VRAM: by phase, or over the call if phases were not separated."""
    phases = [(span, measured.phases[span.name]) for span in spans if span.name in measured.phases]
    if measured.vram_reserved_bytes:
        steps = [(span, peak.reserved_bytes) for span, peak in phases]
        yield _level("reserved", measured.vram_reserved_bytes, steps)
    if measured.vram_allocated_bytes:
        steps = [(span, peak.allocated_bytes) for span, peak in phases]
        yield _level("allocated", measured.vram_allocated_bytes, steps)


def _level(name: str, highest: int, steps: Sequence[tuple[Span, int]]) -> Level:
    places: list[float | None] = []
    sizes: list[float | None] = []
    for span, size in steps:
        gap: list[None] = [None] if places and places[-1] != span.start else []
        places += [*gap, span.start, span.end]
        sizes += [*gap, size / GIB, size / GIB]
    return Level(
        name=f"measured: {name} {format_bytes(highest)}", places=places or [0, 1], sizes=sizes or [highest / GIB] * 2
    )


def _title(simulation: Simulation) -> str:
    verdict = {None: "", True: ": fits", False: ": does not fit"}[simulation.fits]
    limit = "" if simulation.capacity_bytes is None else f" of {format_bytes(simulation.capacity_bytes)}"
    return f"VRAM of a call, {format_bytes(simulation.peak_reserved_bytes)} reserved{limit}{verdict} (simulated)"


def _running(moment: Moment) -> str:
    return moment.module or moment.component or ("moving weights" if moment.phase == "load" else "the pipeline")


def _spans(timeline: Timeline) -> list[tuple[tuple[int, int], Span]]:
    """The phases in order: first and last tick of each, and its span in the picture."""
    found = _stretches(timeline.moments)
    widths = [max(_LEAST_WIDTH, (end - start) / timeline.ticks) for _, start, end in found]
    starts = [sum(widths[:place]) / sum(widths) for place in range(len(widths) + 1)]
    return [
        ((first, last), Span(name=name, start=start, end=end))
        for (name, first, last), start, end in zip(found, starts[:-1], starts[1:], strict=True)
    ]


def _stretches(moments: Sequence[Moment]) -> list[tuple[str, int, int]]:
    """The phases in order: name, first and last tick. Moments of `denoise` before the last of `load` count to the phase
    before them: they move weights away, and no step runs until all is loaded."""
    phases: list[tuple[str, int, int]] = []
    last_load = max((moment.tick for moment in moments if moment.phase == "load"), default=0)
    for moment in moments:
        early = moment.phase == "denoise" and moment.tick < last_load and phases
        name = phases[-1][0] if early else moment.phase
        if phases and phases[-1][0] == name:
            phases[-1] = (name, phases[-1][1], moment.tick)
        else:
            phases.append((name, moment.tick, moment.tick))
    return phases


def _places(moments: Sequence[Moment], spans: Sequence[tuple[tuple[int, int], Span]]) -> list[float]:
    found = []
    at = 0
    for moment in moments:
        while moment.tick > spans[at][0][1]:
            at += 1
        (first, last), span = spans[at]
        found.append(span.start + (span.end - span.start) * (moment.tick - first) / (last - first + 1))
    return found


def _moved_bytes(timeline: Timeline, place: int) -> int:
    """The sum of all changes of a component's weights on the device over the call, in bytes."""
    sizes = [moment.weights_bytes[place] for moment in timeline.moments]
    return sum(abs(after - before) for before, after in pairwise(sizes))


def _device(timeline: Timeline) -> list[Layer]:
    moments = timeline.moments
    # Weights that stay are at the bottom of the stack, those that move on top.
    order = sorted(range(len(timeline.components)), key=lambda place: _moved_bytes(timeline, place))
    weights = [
        Layer(
            name=f"weights: {timeline.components[place] or 'other'}",
            colour=WEIGHTS[number % len(WEIGHTS)],
            sizes=[moment.weights_bytes[place] / GIB for moment in moments],
        )
        for number, place in enumerate(order)
    ]
    activations = [moment.activation_bytes / GIB for moment in moments]
    workspace = [moment.workspace_bytes / GIB for moment in moments]
    return _non_empty(
        *weights,
        Layer(name="activations", colour=ACTIVATIONS, sizes=activations),
        Layer(name="workspace", colour=WORKSPACE, sizes=workspace),
    )


def _non_empty(*layers: Layer) -> list[Layer]:
    """The layers that are not 0 everywhere."""
    return [layer for layer in layers if any(layer.sizes)]
