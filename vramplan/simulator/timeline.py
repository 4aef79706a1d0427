"""The memory over a simulated call, in a bounded number of moments."""

from __future__ import annotations

from dataclasses import dataclass, field

from vramplan.simulator.ledger import Block, Ledger
from vramplan.simulator.types import Moment, SimulatedPhaseName, Timeline

# The maximum number of intervals, each with up to four moments. A plot is about as wide in pixels.
_MAX_INTERVALS = 600

# The fields of a recorded moment, in order; weights of the components known by then.
_MomentFields = tuple[int, SimulatedPhaseName, str, str, str, tuple[int, ...], int, int, int, int, int]
# The values whose peaks are kept: allocated, reserved and host bytes.
_Heights = tuple[int, int, int]


@dataclass(slots=True)
class _Interval:
    """Ticks of one phase from `first` on: the moment of each memory's peak, and the last moment."""

    first: int
    phase: SimulatedPhaseName
    heights: list[int] = field(default_factory=lambda: [-1, -1, -1])
    highest: list[_MomentFields] = field(default_factory=lambda: [_NO_MOMENT] * 3)
    last: _MomentFields = field(default_factory=lambda: _NO_MOMENT)

    def add(self, seen: _MomentFields, heights: _Heights | list[int]) -> None:
        for place, height in enumerate(heights):
            if height > self.heights[place]:
                self.heights[place], self.highest[place] = height, seen
        self.last = seen

    def join(self, later: _Interval) -> None:
        for place, height in enumerate(later.heights):
            if height > self.heights[place]:
                self.heights[place], self.highest[place] = height, later.highest[place]
        self.last = later.last


_NO_MOMENT: _MomentFields = (0, "load", "", "", "", (), 0, 0, 0, 0, 0)


class TimelineRecorder:
    """Records the memory in a ledger over time, in at most `most` intervals: these double in length when they run out.
    An interval never spans two phases."""

    def __init__(self, most: int = _MAX_INTERVALS) -> None:
        self._most = most
        self._width = 1
        self._ticks = 0
        self._weights: dict[str, int] = {}
        self._intervals: list[_Interval] = []

    def note(self, ledger: Ledger, block: Block, size: int) -> None:
        """Record an allocated or freed block; `size` is the change of the device's memory in bytes."""
        if block.place == "nowhere":
            return
        self._ticks += 1
        if block.kind == "weights" and size:
            self._weights[block.owner] = self._weights.get(block.owner, 0) + size
        allocator, on_device = ledger.allocator, ledger.on_device
        host = ledger.host_bytes + ledger.pinned_bytes
        seen: _MomentFields = (
            self._ticks,
            ledger.phase,
            ledger.component,
            ledger.module,
            ledger.operation,
            tuple(self._weights.values()),
            on_device["activation"],
            on_device["workspace"],
            allocator.reserved_bytes,
            host,
            ledger.pinned_bytes,
        )
        # As in the ledger, only allocations make a phase's peak, not memory that it finds and frees.
        allocated = allocator.allocated_bytes if size > 0 else 0
        self._current_interval(ledger.phase).add(seen, (allocated, allocator.reserved_bytes, host))

    def _current_interval(self, phase: SimulatedPhaseName) -> _Interval:
        """The interval of this tick: the last one, or a new one."""
        now = self._intervals[-1] if self._intervals else None
        if now is None or now.phase != phase or self._ticks // self._width != now.first // self._width:
            now = _Interval(self._ticks, phase)
            self._intervals.append(now)
            if len(self._intervals) > self._most:
                self._widen()
        return self._intervals[-1]

    def _widen(self) -> None:
        self._width *= 2
        kept = self._intervals[:1]
        for interval in self._intervals[1:]:
            before = kept[-1]
            if before.phase == interval.phase and before.first // self._width == interval.first // self._width:
                before.join(interval)
            else:
                kept.append(interval)
        self._intervals = kept

    def timeline(self) -> Timeline:
        """The timeline recorded so far."""
        found = {seen[0]: seen for interval in self._intervals for seen in (*interval.highest, interval.last)}
        names = tuple(self._weights)
        return Timeline(
            components=names,
            ticks=self._ticks,
            moments=tuple(_moment(found[tick], len(names)) for tick in sorted(found)),
        )


def _moment(seen: _MomentFields, components: int) -> Moment:
    tick, phase, component, module, operation, weights, activation, workspace, reserved, host, pinned = seen
    return Moment(
        tick=tick,
        phase=phase,
        component=component,
        module=module,
        operation=operation,
        weights_bytes=weights + (0,) * (components - len(weights)),
        activation_bytes=activation,
        workspace_bytes=workspace,
        reserved_bytes=reserved,
        host_bytes=host,
        pinned_bytes=pinned,
    )
