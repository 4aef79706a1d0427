"""The device memory of a whole call, event by event: what a replay needs, and nothing of torch."""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass

# The kind of an event, in the lowest bits of its first number; its operand is in the others.
ALLOCATE, FREE, ENTER, LEAVE, PRODUCT, EMPTY_CACHE, CONVERT, DISCARD = range(8)
_BITS = 3


def event(kind: int, operand: int = 0) -> int:
    """The first number of an event."""
    return operand << _BITS | kind


def split_event(number: int) -> tuple[int, int]:
    """The kind and the operand of an event."""
    return number & (1 << _BITS) - 1, number >> _BITS


@dataclass(frozen=True, slots=True)
class Where:
    """Where a call is: its phase, component, module and operation, and the kind of memory that is allocated there."""

    phase: str
    component: str
    module: str
    operation: str
    kind: str


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

    def to_bytes(self) -> bytes:
        """The trace as compressed bytes."""
        head = {
            "wheres": [list(_values(item)) for item in self.wheres],
            "marks": [list(_values(item)) for item in self.marks],
            "weights": {name: asdict(item) for name, item in self.weights.items()},
            "changed": self.changed,
            "read": self.read,
            "operations": self.operations,
            "steps": self.steps,
        }
        text = json.dumps(head, separators=(",", ":")).encode()
        return zlib.compress(len(text).to_bytes(8, "little") + text + self.events.tobytes(), 9)

    @classmethod
    def from_bytes(cls, content: bytes) -> CallTrace:
        """The trace that `to_bytes` wrote. Raises ValueError if the content is damaged."""
        try:
            plain = zlib.decompress(content)
            end = 8 + int.from_bytes(plain[:8], "little")
            head = json.loads(plain[8:end])
            events = array("q")
            events.frombytes(plain[end:])
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
        except (zlib.error, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a damaged trace: {error}") from error


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
