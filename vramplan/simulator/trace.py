"""The device memory of a whole call, event by event: what a replay needs, and nothing of torch."""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vramplan.simulator.ledger import Kind
from vramplan.simulator.types import SimulatedPhaseName

# The kind of an event, in the lowest bits of its first number; its operand is in the others.
ALLOCATE, FREE, ENTER, LEAVE, PRODUCT, EMPTY_CACHE, CONVERT, DISCARD = range(8)
_BITS = 3


# How many numbers follow the first one.
_MORE = (1, 0, 1, 0, 0, 0, 2, 0)

Event = tuple[int, int, int, int]


def event(kind: int, operand: int = 0) -> int:
    """The first number of an event."""
    return operand << _BITS | kind


def split_event(number: int) -> tuple[int, int]:
    """The kind and the operand of an event."""
    return number & (1 << _BITS) - 1, number >> _BITS


def split_events(events: Iterable[int]) -> Iterator[Event]:
    """The kind, operand and two more numbers of each event, 0 where it has none."""
    numbers = iter(events)
    for number in numbers:
        kind, operand = number & (1 << _BITS) - 1, number >> _BITS
        more = _MORE[kind]
        yield kind, operand, next(numbers) if more else 0, next(numbers) if more > 1 else 0


@dataclass(frozen=True, slots=True)
class Where:
    """Where a call is: its phase, component, module and operation, and the kind of memory that is allocated there.

    `owner` is the component of weights, copies that are made of them included; empty for other kinds.
    """

    phase: SimulatedPhaseName
    component: str
    module: str
    operation: str
    kind: Kind
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """A module of a component at which streaming may bring weights: unit `unit` of it, None for one outside of all.

    `outermost` is the component itself.
    """

    component: str
    unit: int | None
    outermost: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentWeights:
    """The sizes in bytes of a component's tensors: in the order in which `to` moves them, of each unit, and of those
    outside of units."""

    moved: tuple[int, ...]
    units: tuple[tuple[int, ...], ...]
    outside: tuple[int, ...]
    in_loop: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTrace:
    """The device memory of a call with all weights resident.

    `events` are those of the call itself, of one or two numbers: ALLOCATE with the index of a `where` and the bytes,
    FREE with how many allocations ago the block was made, ENTER and LEAVE with the index of a mark, and for ENTER the
    index of a `where`; PRODUCT is the first matrix product, whose workspace stays. CONVERT replaces a weight, as when a
    pipeline casts its VAE: the index of a `where`, then that of the weight among those moved of all components, and its
    new bytes. DISCARD frees one. Both are of components in `changed`. The pipeline itself
    reads weights of those in `read`, outside of their forwards.
    """

    events: array[int]
    wheres: tuple[Where, ...]
    marks: tuple[Mark, ...]
    weights: Mapping[str, ComponentWeights]
    changed: tuple[str, ...]
    read: tuple[str, ...]
    operations: int
    steps: int

    @property
    def owners(self) -> list[str]:
        """The component of each weight, by its number."""
        return [name for name, weights in self.weights.items() for _ in weights.moved]

    def to_bytes(self) -> bytes:
        """The trace as bytes."""
        head = {
            "wheres": [list(_values(item)) for item in self.wheres],
            "marks": [list(_values(item)) for item in self.marks],
            "weights": {name: asdict(item) for name, item in self.weights.items()},
            "changed": self.changed,
            "read": self.read,
            "operations": self.operations,
            "steps": self.steps,
        }
        return _pack(head, self.events)

    @classmethod
    def from_bytes(cls, content: bytes) -> CallTrace:
        """The trace that `to_bytes` wrote. Raises ValueError if the content is damaged."""
        try:
            head, events = _unpack(content)
            return cls(
                events=events,
                wheres=tuple(Where(*item) for item in head["wheres"]),
                marks=tuple(Mark(*item) for item in head["marks"]),
                weights={name: _weights(item) for name, item in head["weights"].items()},
                changed=tuple(head["changed"]),
                read=tuple(head["read"]),
                operations=head["operations"],
                steps=head["steps"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a damaged trace: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """The weights of components `names` on the device in a call, under a placement with hooks of its own.

    It is laid over the trace of the same call, in place of the events of these weights. `events` are: the number of the
    trace's other events that come before, -1 while weights are loaded; then an event as in the trace, where ALLOCATE is
    followed by the bytes and the number of a stream of its own, 0 for the default one.
    """

    names: tuple[str, ...]
    events: array[int]
    wheres: tuple[Where, ...]

    def to_bytes(self) -> bytes:
        """The overlay as bytes."""
        return _pack({"names": self.names, "wheres": [list(_values(item)) for item in self.wheres]}, self.events)

    @classmethod
    def from_bytes(cls, content: bytes) -> Overlay:
        """The overlay that `to_bytes` wrote. Raises ValueError if the content is damaged."""
        try:
            head, events = _unpack(content)
            wheres = tuple(Where(*item) for item in head["wheres"])
            return cls(names=tuple(head["names"]), events=events, wheres=wheres)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a damaged overlay: {error}") from error


def _pack(head: Mapping[str, object], events: array[int]) -> bytes:
    text = json.dumps(head, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + events.tobytes()


def _unpack(content: bytes) -> tuple[dict[str, Any], array[int]]:
    end = 8 + int.from_bytes(content[:8], "little")
    events = array("q")
    events.frombytes(content[end:])
    return json.loads(content[8:end]), events


def other_events(trace: CallTrace, names: Collection[str]) -> Iterator[tuple[Any, ...]]:
    """The events of a trace but for those of the weights of these components, numbered without them.

    Two traces of one call, under different placements of these components, have the same ones.
    """
    owners = trace.owners
    numbers: list[int | None] = []
    count = 0
    for kind, operand, first, second in split_events(trace.events):
        if kind == ALLOCATE:
            where = trace.wheres[operand]
            numbers.append(None if where.owner in names else count)
            if numbers[-1] is not None:
                count += 1
                yield kind, where.phase, where.component, where.module, where.kind, first
        elif kind == FREE:
            if numbers[-operand] is not None:
                yield kind, numbers[-operand]
        elif kind in (ENTER, LEAVE):
            yield kind, trace.marks[operand]
        elif kind == CONVERT:
            if owners[first] not in names:
                yield kind, owners[first], second
        elif kind != DISCARD or owners[operand] not in names:
            yield (kind,)


def _values(item: Where | Mark) -> tuple[object, ...]:
    return tuple(getattr(item, name) for name in type(item).__slots__)


def _weights(item: Mapping[str, object]) -> ComponentWeights:
    units = tuple(map(tuple, item["units"]))  # type: ignore[call-overload]
    return ComponentWeights(
        moved=tuple(item["moved"]),  # type: ignore[arg-type]
        units=units,
        outside=tuple(item["outside"]),  # type: ignore[arg-type]
        in_loop=bool(item["in_loop"]),
    )
