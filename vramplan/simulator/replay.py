"""Replay a recorded call under another placement of its weights: the same ledger, allocator and cache, without torch.

Activations come and go as recorded. Weights come and go as their placement says: resident ones stay, streamed ones
follow the engine's own cache (`streaming.cache`), which runs here on blocks that have a size and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vramplan.simulator.allocator import CachingAllocator
from vramplan.simulator.ledger import Block, Ledger
from vramplan.simulator.result import simulation_of
from vramplan.simulator.trace import (
    ALLOCATE,
    CONVERT,
    DISCARD,
    EMPTY_CACHE,
    ENTER,
    FREE,
    LEAVE,
    PRODUCT,
    CallTrace,
    Event,
    Mark,
    Overlay,
    Where,
    split_event,
    split_events,
)
from vramplan.simulator.types import Simulation
from vramplan.strategies.base import Placement
from vramplan.strategies.resident import Resident
from vramplan.strategies.settings import grouped
from vramplan.strategies.weight_streaming import WeightStreaming
from vramplan.streaming.cache import Cache
from vramplan.streaming.division import aligned, divide
from vramplan.streaming.member import Member

# Streams of different overlays are different ones: each has at most so many.
_STREAMS = 1000
# An event that stands for none.
_NOTHING: Event = (-1, 0, 0, 0)


class CapacityError(Exception):
    """The device of a replay is full."""


def needs_overlay(setting: Placement) -> bool:
    """Whether a placement has hooks of its own, whose effect is recorded."""
    return not isinstance(setting, Resident | WeightStreaming)


def replay_refusal(trace: CallTrace, placement: Mapping[str, Placement]) -> str | None:
    """Why the call must be simulated under this placement, None if its replay is the same."""
    for name, setting in placement.items():
        if setting.freed:
            return f"{name} is dropped in the middle of the call"
        if name not in trace.weights:
            return f"{name} was not recorded"
        if isinstance(setting, WeightStreaming) and name in trace.changed and trace.weights[name].units:
            return f"the call changes the weights of {name}"
        if isinstance(setting, WeightStreaming) and name in trace.read:
            return f"the pipeline itself reads weights of {name}"
    if missing := trace.weights.keys() - placement.keys():
        return f"{', '.join(sorted(missing))} has no placement"
    return _stream_refusal(trace, placement)


def _stream_refusal(trace: CallTrace, placement: Mapping[str, Placement]) -> str | None:
    """Why streams of several components have an effect on each other; None if they do not."""
    order = dict.fromkeys(mark.component for mark in trace.marks)
    waiting = None  # a component whose memory is only given back when a stream is used again
    for name in (name for name in order if getattr(placement.get(name), "stream", False)):
        if waiting is not None:
            return f"the stream of {name} gives back memory of {waiting}"
        waiting = name if getattr(placement[name], "record_stream", False) else None
    return None


def replay(
    trace: CallTrace,
    placement: Mapping[str, Placement],
    overlays: Sequence[Overlay] = (),
    *,
    cublas_bytes: int,
    capacity_bytes: int | None = None,
    expandable: bool = False,
) -> Simulation:
    """Replay a call under a placement that `replay_refusal` has nothing against. Work and transfers are left out.

    There is an overlay for every component whose placement needs one.
    """
    start = time.perf_counter()
    allocator = CachingAllocator(capacity_bytes=capacity_bytes, expandable=expandable)
    ledger = Ledger(allocator, out_of_memory=CapacityError)
    stopped = None
    try:
        _Replay(trace, ledger, placement, overlays, cublas_bytes).run()
    except CapacityError as error:
        stopped = str(error)
    ledger.operations = trace.operations
    return simulation_of(ledger, stopped, steps=trace.steps, seconds=time.perf_counter() - start)


class _Replay:
    def __init__(
        self,
        trace: CallTrace,
        ledger: Ledger,
        placement: Mapping[str, Placement],
        overlays: Sequence[Overlay],
        cublas_bytes: int,
    ) -> None:
        self.trace = trace
        self.ledger = ledger
        self.placement = placement
        self.cublas_bytes = cublas_bytes
        self.laid_over = {
            name: layer
            for number, overlay in enumerate(overlays)
            for layer in [_Layer(overlay, ledger, number * _STREAMS)]
            for name in overlay.names
        }
        memory: Any = _Memory(ledger)
        self.cache = Cache(memory)
        self.members: dict[str, tuple[Member, Mapping[int, Any]]] = {}
        self.held: list[Block] = []
        self.weights: dict[int, Block | None] = {}  # the resident ones, by their number among those of all components
        self.streamed: dict[int, tuple[WeightsBlock, int]] = {}  # the block of a streamed one, and its bytes

    def run(self) -> None:
        self._load()
        with self.cache.call():
            self._play()

    def _load(self) -> None:
        self.ledger.start_loading()
        first = 0
        numbers: dict[str, range] = {}
        for name, weights in self.trace.weights.items():
            numbers[name] = range(first, first + len(weights.moved))
            first += len(weights.moved)
        for setting, names in grouped(self.placement, {}, {}):
            for name in names:
                if name in self.laid_over:
                    self.laid_over[name].load()
                    continue
                moved = dict(zip(numbers[name], self.trace.weights[name].moved, strict=True))
                if isinstance(setting, WeightStreaming):
                    self._stream(name, setting)
                    block: Any = self.members[name][0].rest
                    if block is not None:
                        self.streamed |= {number: (block, size) for number, size in moved.items()}
                else:
                    for number, size in moved.items():
                        self.weights[number] = Block(self.ledger, size, "device", "weights", name)

    def _hold(self, name: str, sizes: Iterable[int]) -> None:
        self.held += [Block(self.ledger, size, "device", "weights", name) for size in sizes]

    def _stream(self, name: str, setting: WeightStreaming) -> None:
        weights = self.trace.weights[name]
        division = divide([sum(sizes) for sizes in weights.units], streamed=setting.streamed, keep=setting.keep)
        for place in division.kept:
            self._hold(name, weights.units[place])
        if setting.keep:
            self._hold(name, weights.outside)
        blocks: dict[int, Any] = {
            place: WeightsBlock(_laid_out(weights.units[place])) for place in sorted(division.by_need)
        }
        rest: Any = None if setting.keep else WeightsBlock(_laid_out(weights.outside))
        member = Member(
            name,
            rest,
            list(blocks.values()),
            [blocks[place] for place in division.streamed],
            in_loop=weights.in_loop,
        )
        self.cache.members.append(member)
        self.members[name] = member, blocks

    def _play(self) -> None:
        ledger, wheres = self.ledger, self.trace.wheres
        alive: list[Block | None] = []
        for kind, operand, first, second in self._events():
            if kind == ALLOCATE:
                where = wheres[operand]
                go_to(ledger, where)
                alive.append(Block(ledger, first, "device", where.kind, where.owner))
            elif kind == FREE:
                alive[-operand] = None
            elif kind == ENTER:
                go_to(ledger, wheres[first])
                self._enter(self.trace.marks[operand])
            elif kind == LEAVE:
                self._leave(self.trace.marks[operand])
            elif kind == PRODUCT:
                go_to(ledger, wheres[operand])
                self.held.append(Block(ledger, self.cublas_bytes, "device", "workspace"))
            elif kind == CONVERT:
                go_to(ledger, wheres[operand])
                self._convert(first, second)
            elif kind == DISCARD:
                self.weights[operand] = None
            elif kind == EMPTY_CACHE:
                ledger.empty_cache()
            else:
                alive.append(None)

    def _events(self) -> Iterator[Event]:
        """The events of the trace, those of overlays between them. An allocation in whose place an overlay's own ones
        come is of no kind."""
        events = split_events(self.trace.events)
        if not self.laid_over:
            yield from events
            return
        layers, owners = list(dict.fromkeys(self.laid_over.values())), self.trace.owners
        allocated: list[_Layer | None] = []
        for number in events:
            kind, operand, first, _ = number
            own = None
            if kind == ALLOCATE:
                own = self.laid_over.get(self.trace.wheres[operand].owner)
                allocated.append(own)
            elif kind == FREE:
                own = allocated[-operand]
            elif kind in (CONVERT, DISCARD):
                own = self.laid_over.get(owners[first if kind == CONVERT else operand])
            for layer in layers:
                if layer is not own:
                    layer.advance()
            if own is None:
                yield number
            elif kind == ALLOCATE:
                yield _NOTHING
        for layer in layers:
            layer.finish()

    def _convert(self, weight: int, size: int) -> None:
        if weight in self.streamed:  # in host memory: its block is laid out anew the next time
            block, before = self.streamed[weight]
            block.resize(aligned(size) - aligned(before))
            self.streamed[weight] = block, size
        else:
            before_it = self.weights.get(weight)
            self.weights[weight] = Block(self.ledger, size, "device", "weights", before_it.owner if before_it else "")

    def _enter(self, mark: Mark) -> None:
        found = self.members.get(mark.component)
        if found is None:
            self.cache.others_run(in_loop=self.trace.weights[mark.component].in_loop)
            return
        member, blocks = found
        if mark.outermost:
            self.cache.begin(member)
        self.cache.need(member, None if mark.unit is None else blocks.get(mark.unit))

    def _leave(self, mark: Mark) -> None:
        found = self.members.get(mark.component)
        if found is not None:
            member, blocks = found
            self.cache.done(member, None if mark.unit is None else blocks.get(mark.unit))


def go_to(ledger: Ledger, where: Where) -> None:
    """Let the ledger be where the call was."""
    ledger.phase, ledger.component, ledger.operation = where.phase, where.component, where.operation
    ledger.modules = [where.module]


class _Layer:
    """An overlay as it is played, `position` events of the trace into the call."""

    def __init__(self, overlay: Overlay, ledger: Ledger, first_stream: int) -> None:
        self._wheres = overlay.wheres
        self._ledger = ledger
        self._first_stream = first_stream
        self._events = iter(overlay.events)
        self._next = next(self._events, None)
        self._position = 0
        self._alive: list[Block | None] = []

    def load(self) -> None:
        """Play what happens while weights are loaded."""
        self._until(-1)

    def advance(self) -> None:
        """Play what comes before the next event of the trace."""
        if self._next is not None and self._next <= self._position:
            self._until(self._position)
        self._position += 1

    def finish(self) -> None:
        """Play what comes after the last one."""
        self._until(self._position)

    def _until(self, position: int) -> None:
        while self._next is not None and self._next <= position:
            kind, operand = split_event(next(self._events))
            if kind == ALLOCATE:
                self._allocate(self._wheres[operand], next(self._events), next(self._events))
            elif kind == FREE:
                self._alive[-operand] = None
            else:
                self._ledger.empty_cache()
            self._next = next(self._events, None)

    def _allocate(self, where: Where, size: int, stream: int) -> None:
        ledger = self._ledger
        go_to(ledger, where)
        ledger.stream = self._first_stream + stream if stream else 0
        try:
            self._alive.append(Block(ledger, size, "device", "weights", where.owner))
        finally:
            ledger.stream = 0


class _Memory:
    """The backend of a cache whose copies take no time: a buffer is a block of the ledger."""

    out_of_memory: type[Exception] = CapacityError

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def allocate(self, size: int, owner: str) -> Block:
        return Block(self.ledger, size, "device", "weights", owner)

    def gather(self, buffer: Block, parts: Any) -> None:
        """Do nothing."""

    def view(self, buffer: Block, offset: int, like: Any) -> Block:
        return buffer

    def compute_after(self, ticket: Any) -> None:
        """Do nothing."""

    def copy_after_compute(self) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class WeightsBlock:
    """A block of weights as a cache sees it (`streaming.tensors.Block`), of a size and nothing else."""

    moved = False
    segments = offsets = tensors = ()

    def __init__(self, size: int) -> None:
        self.size = size
        self.buffer: Block | None = None
        self.slot: Any = None
        self.ticket: Any = None
        self.active = 0
        self.outdated = False

    def resize(self, more: int) -> None:
        """Note that its weights are other ones, which take so many bytes more."""
        self.size += more
        self.outdated = True

    def on_device(self, buffer: Block, view: Any, views: Any) -> None:
        """Note its buffer."""
        self.buffer, self.outdated = buffer, False

    def off_device(self) -> None:
        """Forget its buffer."""
        if self.slot is not None:
            self.slot.block = self.slot = None
        self.buffer = None

    def show(self) -> None:
        """Do nothing."""

    def hide(self) -> None:
        """Do nothing."""

    def refuse_later_backward(self) -> None:
        """Do nothing."""


def _laid_out(sizes: Iterable[int]) -> int:
    return sum(map(aligned, sizes))
