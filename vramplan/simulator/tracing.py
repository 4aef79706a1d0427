"""Record the device memory of a whole call on the simulated device."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch

from vramplan.pipeline.modules import modules_of
from vramplan.simulator.ledger import Block, Cost, Kind, Ledger
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
    Overlay,
    Where,
    event,
    split_event,
)
from vramplan.streaming.attach import hook_points, runs_in_loop, split_tensors, streamed_units
from vramplan.streaming.calls import methods
from vramplan.streaming.hooks import Marker


class TraceRecorder:
    """Listens to a ledger: the load of weights first, then the call.

    The weights of components `laid_over` are recorded apart from the rest.
    """

    def __init__(self, ledger: Ledger, laid_over: Collection[str] = ()) -> None:
        self.ledger = ledger
        self._names = tuple(laid_over)
        self._overlay = array("q")
        self._overlay_wheres: dict[Where, int] = {}
        self._overlay_alive: dict[int, int] = {}
        self._overlay_count = 0
        self._position = 0
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

    # ---- the ledger's events

    def on_allocate(self, block: Block, module: str, operation: str) -> None:
        """Record a block on the device."""
        if block.place != "device":
            return
        if block.kind == "weights" and block.owner in self._names:
            self._overlay_alive[id(block)] = self._overlay_count
            self._overlay_count += 1
            where = self._where(block, self._overlay_wheres)
            self._lay_over(event(ALLOCATE, where), block.size, self.ledger.stream)
            return
        if self._loading:
            self._moved.setdefault(block.owner, []).append(block.size)
            self._weights[id(block)] = len(self._owners)
            self._owners.append(block.owner)
            return
        self._made = weakref.ref(block) if block.kind == "weights" else None
        self._alive[id(block)] = self._count
        self._count += 1
        self._add(event(ALLOCATE, self._where(block)), block.size)

    def on_free(self, block: Block) -> None:
        """Record a freed block."""
        if block.place != "device":
            return
        over = self._overlay_alive.pop(id(block), None)
        if over is not None:
            self._lay_over(event(FREE, self._overlay_count - over))
            return
        weight = self._weights.pop(id(block), None)
        if weight is not None:
            self._change(weight)
        else:
            number = self._alive.pop(id(block), None)
            if number is not None:  # and not a workspace, which is recorded as that
                self._add(event(FREE, self._count - number))
        self._made = None

    def _change(self, weight: int) -> None:
        """Record that a weight is freed: another one has taken its place if that was made last."""
        owner = self._owners[weight]
        self._changed[owner] = None
        made = self._made() if self._made is not None else None
        if made is None or made.owner != owner:
            self._add(event(DISCARD, weight))
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
            self._add(event(PRODUCT, self._where(None)))

    def on_empty_cache(self) -> None:
        """Record that cached segments are released, which a placement's hooks do."""
        if self._names:
            self._lay_over(event(EMPTY_CACHE))
        else:
            self._add(event(EMPTY_CACHE))

    # ---- marks

    def enter(self, mark: Mark) -> None:
        """Record that a marked module begins."""
        self._add(event(ENTER, self._marks.setdefault(mark, len(self._marks))), self._where(None))

    def leave(self, mark: Mark) -> None:
        """Record that a marked module ends."""
        self._add(event(LEAVE, self._marks[mark]))

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
            for method, made in methods(module, partial(self._entered, Mark(name, None, False))).items():
                module.__dict__[method] = MethodType(made, module)

    @contextmanager
    def _entered(self, mark: Mark, module: Any) -> Iterator[None]:
        self.enter(mark)
        try:
            yield
        finally:
            self.leave(mark)

    def _add(self, *numbers: int) -> None:
        self.events.extend(numbers)
        self._position += 1

    def _lay_over(self, *numbers: int) -> None:
        self._overlay.extend((-1 if self._loading else self._position, *numbers))

    def _where(self, block: Block | None, wheres: dict[Where, int] | None = None) -> int:
        """The index of where the call is, and of what it allocates, by default in the trace."""
        ledger, known = self.ledger, self._wheres if wheres is None else wheres
        kind: Kind = "activation" if block is None else block.kind
        owner = block.owner if block is not None and kind == "weights" else ""
        made = Where(ledger.phase, ledger.component, ledger.module, ledger.operation, kind, owner)
        return known.setdefault(made, len(known))

    def overlay(self) -> Overlay:
        """What was recorded apart."""
        return Overlay(names=self._names, events=self._overlay, wheres=tuple(self._overlay_wheres))

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
