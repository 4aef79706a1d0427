"""The memory over a simulated call, in a bounded number of moments."""

from __future__ import annotations

from dataclasses import dataclass, field

from vramplan.simulator.ledger import Block, Ledger
from vramplan.simulator.types import Moment, SimulatedPhaseName, Timeline

# Stretches of a call, of each of which four moments are kept at most. A picture is about as wide in pixels.
_MAX_INTERVALS = 600

# A moment while it is recorded: its fields in order, the weights of the components known by then.
_MomentFields = tuple[int, SimulatedPhaseName, str, str, str, tuple[int, ...], int, int, int, int, int]
# What has peaks that must not be lost: allocated, reserved and host bytes.
_Heights = tuple[int, int, int]


@dataclass(slots=True)
class _Interval:
    """Ticks of one phase from `first` on: the moments at which each memory was highest, and the last one."""

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
    """Notes what a ledger books. Where a call is longer than there is room, stretches become twice as long; a stretch
    never spans two phases."""

    def __init__(self, most: int = _MAX_INTERVALS) -> None:
        self._most = most
        self._width = 1
        self._ticks = 0
        self._weights: dict[str, int] = {}
        self._stretches: list[_Interval] = []

    def note(self, ledger: Ledger, block: Block, size: int) -> None:
        """A block was entered or taken out; `size` is by how much the device's memory changed."""
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
        # As the ledger has it: a phase's peak is made by what it takes, not by what it finds there and gives back.
        allocated = allocator.allocated_bytes if size > 0 else 0
        self._stretch(ledger.phase).add(seen, (allocated, allocator.reserved_bytes, host))

    def _stretch(self, phase: SimulatedPhaseName) -> _Interval:
        """The one that goes on, or a new one."""
        now = self._stretches[-1] if self._stretches else None
        if now is None or now.phase != phase or self._ticks // self._width != now.first // self._width:
            now = _Interval(self._ticks, phase)
            self._stretches.append(now)
            if len(self._stretches) > self._most:
                self._widen()
        return self._stretches[-1]

    def _widen(self) -> None:
        self._width *= 2
        kept = self._stretches[:1]
        for stretch in self._stretches[1:]:
            before = kept[-1]
            if before.phase == stretch.phase and before.first // self._width == stretch.first // self._width:
                before.join(stretch)
            else:
                kept.append(stretch)
        self._stretches = kept

    def timeline(self) -> Timeline:
        """What was recorded so far."""
        found = {seen[0]: seen for stretch in self._stretches for seen in (*stretch.highest, stretch.last)}
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
