"""Replay a recorded call under another placement of its weights: the same ledger, allocator and cache, without torch.

Activations come and go as recorded. Weights come and go as their placement says: resident ones stay, streamed ones
follow the engine's own cache (`streaming.cache`), which runs here on blocks that have a size and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
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
    CallTrace,
    Mark,
    Where,
    split_event,
)
from vramplan.simulator.types import Simulation
from vramplan.strategies.base import Placement
from vramplan.strategies.resident import Resident
from vramplan.strategies.settings import grouped
from vramplan.strategies.weight_streaming import WeightStreaming
from vramplan.streaming.cache import Cache, Member
from vramplan.streaming.division import aligned, divide


class CapacityError(Exception):
    """The device of a replay is full."""


def replay_refusal(trace: CallTrace, placement: Mapping[str, Placement]) -> str | None:
    """Why the call must be simulated under this placement, None if its replay is the same."""
    for name, setting in placement.items():
        if not isinstance(setting, Resident | WeightStreaming):
            return f"{setting.name} has hooks of its own"
        if name not in trace.weights:
            return f"{name} was not recorded"
        if isinstance(setting, WeightStreaming) and name in trace.changed and trace.weights[name].units:
            return f"the call changes the weights of {name}"
        if isinstance(setting, WeightStreaming) and name in trace.read:
            return f"the pipeline itself reads weights of {name}"
    if missing := trace.weights.keys() - placement.keys():
        return f"{', '.join(sorted(missing))} has no placement"
    return None


def replay(
    trace: CallTrace,
    placement: Mapping[str, Placement],
    *,
    cublas_bytes: int,
    capacity_bytes: int | None = None,
    expandable: bool = False,
) -> Simulation:
    """Replay a call under a placement that `replay_refusal` has nothing against. Work and transfers are left out."""
    start = time.perf_counter()
    allocator = CachingAllocator(capacity_bytes=capacity_bytes, expandable=expandable)
    ledger = Ledger(allocator, out_of_memory=CapacityError)
    stopped = None
    try:
        _Replay(trace, ledger, placement, cublas_bytes).run()
    except CapacityError as error:
        stopped = str(error)
    ledger.operations = trace.operations
    return simulation_of(ledger, stopped, steps=trace.steps, seconds=time.perf_counter() - start)


class _Replay:
    def __init__(self, trace: CallTrace, ledger: Ledger, placement: Mapping[str, Placement], cublas_bytes: int) -> None:
        self.trace = trace
        self.ledger = ledger
        self.placement = placement
        self.cublas_bytes = cublas_bytes
        self.cache = Cache(_Memory(ledger))
        self.members: dict[str, tuple[Member, Mapping[int, WeightsBlock]]] = {}
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
                moved = dict(zip(numbers[name], self.trace.weights[name].moved, strict=True))
                if isinstance(setting, WeightStreaming):
                    self._stream(name, setting)
                    block = self.members[name][0].rest
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
        blocks = {place: WeightsBlock(_laid_out(weights.units[place])) for place in sorted(division.by_need)}
        member = Member(
            name,
            None if setting.keep else WeightsBlock(_laid_out(weights.outside)),
            list(blocks.values()),
            [blocks[place] for place in division.streamed],
            in_loop=weights.in_loop,
        )
        self.cache.members.append(member)
        self.members[name] = member, blocks

    def _play(self) -> None:
        ledger, trace = self.ledger, self.trace
        alive: list[Block | None] = []
        events = iter(trace.events)
        for number in events:
            kind, operand = split_event(number)
            if kind == ALLOCATE:
                where = trace.wheres[operand]
                self._go_to(where)
                alive.append(Block(ledger, next(events), "device", where.kind))
            elif kind == FREE:
                alive[-operand] = None
            elif kind == ENTER:
                self._go_to(trace.wheres[next(events)])
                self._enter(trace.marks[operand])
            elif kind == LEAVE:
                self._leave(trace.marks[operand])
            elif kind == EMPTY_CACHE:
                ledger.empty_cache()
            elif kind == CONVERT:
                self._go_to(trace.wheres[operand])
                self._convert(next(events), next(events))
            elif kind == DISCARD:
                self.weights[operand] = None
            else:
                self._go_to(trace.wheres[operand])
                self.held.append(Block(ledger, self.cublas_bytes, "device", "workspace"))

    def _convert(self, weight: int, size: int) -> None:
        if weight in self.streamed:  # in host memory: its block is laid out anew the next time
            block, before = self.streamed[weight]
            block.resize(aligned(size) - aligned(before))
            self.streamed[weight] = block, size
        else:
            before_it = self.weights.get(weight)
            self.weights[weight] = Block(self.ledger, size, "device", "weights", before_it.owner if before_it else "")

    def _go_to(self, where: Where) -> None:
        ledger = self.ledger
        ledger.phase, ledger.component, ledger.operation = where.phase, where.component, where.operation
        ledger.modules = [where.module]

    def _enter(self, mark: Mark) -> None:
        found = self.members.get(mark.component)
        if found is None:
            if not self.trace.weights[mark.component].in_loop:
                self.cache.others_run()
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


class _Memory:
    """The backend of a cache whose copies take no time: a buffer is a block of the ledger."""

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

    def on_device(self, buffer: Block, view: Any) -> None:
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
