"""Record the device memory of a whole call on the simulated device."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch

from vramplan.pipeline.modules import modules_of
from vramplan.simulator.ledger import Block, Cost, Ledger
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
    ComponentWeights,
    Mark,
    Where,
    event,
    split_event,
)
from vramplan.streaming.attach import hook_points, runs_in_loop, split_tensors, streamed_units
from vramplan.streaming.calls import methods
from vramplan.streaming.hooks import Marker


class TraceRecorder:
    """Listens to a ledger: the load of resident weights first, then the call."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.broken = False  # set by whoever tells the recorders of a forward that it cannot be replayed
        self.events = array("q")
        self._wheres: dict[Where, int] = {}
        self._marks: dict[Mark, int] = {}
        self._alive: dict[int, int] = {}
        self._count = 0
        self._multiplied = False
        self._loading = True
        self._moved: dict[str, list[int]] = {}
        self._weights: dict[int, int] = {}  # by the block that holds it, the number of a weight
        self._owners: list[str] = []
        self._made: weakref.ref[Block] | None = None  # the last event, if it made a weight
        self._changed: dict[str, None] = {}
        self._read: dict[str, None] = {}
        self._sizes: dict[str, ComponentWeights] = {}
        ledger.recorders.append(self)

    # ---- the ledger's events

    def on_allocate(self, block: Block, module: str, operation: str) -> None:
        """Record a block on the device."""
        if block.place != "device":
            return
        if self._loading:
            self._moved.setdefault(block.owner, []).append(block.size)
            self._weights[id(block)] = len(self._owners)
            self._owners.append(block.owner)
            return
        self._made = weakref.ref(block) if block.kind == "weights" else None
        self._alive[id(block)] = self._count
        self._count += 1
        self.events.append(event(ALLOCATE, self._where(block.kind)))
        self.events.append(block.size)

    def on_free(self, block: Block) -> None:
        """Record a freed block."""
        if block.place != "device":
            return
        weight = self._weights.pop(id(block), None)
        if weight is not None:
            self._change(weight)
        else:
            number = self._alive.pop(id(block), None)
            if number is not None:  # and not a workspace, which is recorded as that
                self.events.append(event(FREE, self._count - number))
        self._made = None

    def _change(self, weight: int) -> None:
        """Record that a weight is freed: another one has taken its place if that was made last."""
        owner = self._owners[weight]
        self._changed[owner] = None
        made = self._made() if self._made is not None else None
        if made is None or made.owner != owner:
            self.events.append(event(DISCARD, weight))
            return
        size, where = self.events.pop(), split_event(self.events.pop())[1]
        self._count -= 1
        del self._alive[id(made)]
        self._weights[id(made)] = weight
        self.events.extend((event(CONVERT, where), weight, size))

    def on_count(self, module: str, cost: Cost) -> None:
        """Record nothing: work is counted elsewhere."""

    def on_transfer(self, source: str, target: str, size: int) -> None:
        """Record nothing: transfers depend on the placement."""

    def on_read(self, block: Block) -> None:
        """Note that the pipeline itself reads a weight of a component, which is a copy where that is not there."""
        if not self._loading and id(block) in self._weights:
            self._read[block.owner] = None

    def on_product(self) -> None:
        """Record the first matrix product."""
        self._made = None
        if not self._multiplied:
            self._multiplied = True
            self.events.append(event(PRODUCT, self._where("workspace")))

    def on_empty_cache(self) -> None:
        """Record that cached segments are released."""
        self.events.append(event(EMPTY_CACHE))

    # ---- marks

    def enter(self, mark: Mark) -> None:
        """Record that a marked module begins."""
        self.events.append(event(ENTER, self._marks.setdefault(mark, len(self._marks))))
        self.events.append(self._where("weights"))

    def leave(self, mark: Mark) -> None:
        """Record that a marked module ends."""
        self.events.append(event(LEAVE, self._marks[mark]))

    def mark(self, pipe: Any) -> None:
        """Set marks on the modules of a pipeline whose weights are on the device; its call follows."""
        self._loading = False
        for name, module in modules_of(pipe).items():
            units = streamed_units(name, module)
            own, outside = split_tensors(module, units)
            self._sizes[name] = ComponentWeights(
                moved=tuple(self._moved.get(name, ())),
                units=tuple(tuple(map(_bytes, tensors)) for tensors in own),
                outside=tuple(map(_bytes, outside)),
                in_loop=runs_in_loop(name, module),
            )
            for child, unit in hook_points(module, units):
                mark = Mark(name, unit, child is module)
                child.register_forward_pre_hook(Marker(self.enter, mark))
                child.register_forward_hook(Marker(self.leave, mark), always_call=True)
            for method, made in methods(module, lambda _, name=name: self._entered(Mark(name, None, False))).items():
                module.__dict__[method] = MethodType(made, module)

    @contextmanager
    def _entered(self, mark: Mark) -> Iterator[None]:
        self.enter(mark)
        try:
            yield
        finally:
            self.leave(mark)

    def _where(self, kind: str) -> int:
        ledger = self.ledger
        made = Where(ledger.phase, ledger.component, ledger.module, ledger.operation, kind)
        return self._wheres.setdefault(made, len(self._wheres))

    def trace(self, steps: int) -> CallTrace:
        """What was recorded, of a call with so many steps."""
        return CallTrace(
            events=self.events,
            wheres=tuple(self._wheres),
            marks=tuple(self._marks),
            weights={name: self._sizes[name] for name in (*self._moved, *(self._sizes.keys() - self._moved.keys()))},
            changed=tuple(self._changed),
            read=tuple(self._read),
            operations=self.ledger.operations,
            steps=steps,
        )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
