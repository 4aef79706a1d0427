"""A candidate with its price and verdict, the order of several, and all of them with the chosen one first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vramplan.planner.candidates import Refused
from vramplan.planner.demand import Demand
from vramplan.planner.order import Prefer, Verdict, first_of, order, rounded
from vramplan.strategies.base import QUALITIES, Decode, Execution, Placement, Quality, Weights
from vramplan.strategies.resident import Resident


def worst_quality(settings: Sequence[Weights | Placement | Decode | Execution]) -> Quality:
    """Return the least faithful quality among settings."""
    return max((setting.quality for setting in settings), key=QUALITIES.index, default="lossless")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A candidate with its price and verdict. `deficit_bytes` is 0 if it fits."""

    placement: Mapping[str, Placement]
    decode: tuple[Decode, ...]
    weights: Mapping[str, Weights] = field(default_factory=dict)
    execution: Mapping[str, tuple[Execution, ...]] = field(default_factory=dict)
    demand: Demand
    verdict: Verdict
    reason: str
    deficit_bytes: int

    @property
    def quality(self) -> Quality:
        """Quality of the least faithful setting."""
        return self.quality_without({})

    def quality_without(self, fixed: Mapping[str, tuple[Execution, ...]]) -> Quality:
        """Quality of the least faithful setting, ignoring attention and compile settings the user fixed."""
        execution = [
            item for name in self.execution for item in self.execution[name] if item not in fixed.get(name, ())
        ]
        return worst_quality([*self.weights.values(), *execution, *self.placement.values(), *self.decode])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All decisions, the chosen one first, and the refused settings."""

    decisions: tuple[Decision, ...]
    refused: tuple[Refused, ...]

    @property
    def chosen(self) -> Decision:
        """The decision that the plan records."""
        return self.decisions[0]


def _compared(decision: Decision) -> dict[str, float]:
    """Return the values that candidates are ordered by (`order`)."""
    return {
        "seconds": decision.demand.seconds_per_call,
        "quality": QUALITIES.index(decision.quality),
        "changed": len(decision.weights),
        "custom": sum(not setting.stock for setting in decision.placement.values()),
        "offloaded": sum(setting != Resident() for setting in decision.placement.values()),
        "ram_bytes": decision.demand.ram_bytes,
        "vram_bytes": decision.demand.vram_reserved_bytes,
    }


def first_decision(items: Sequence[Decision], prefer: Prefer) -> Decision:
    """Return the first in order, with times compared as far as they are known."""
    return items[first_of(prefer, [(_compared(item), item.demand.seconds_if_slower) for item in items])]


def rank(decision: Decision, prefer: Prefer) -> tuple[float, ...]:
    """Return the values to list candidates by; lower is better."""
    return tuple(rounded(value, digits) for value, digits in order(prefer, **_compared(decision)))


def distinct(items: Sequence[Decision], chosen: Decision) -> list[Decision]:
    """Each of the decisions once, without the chosen one: rows may have the same best candidate."""
    told: list[Any] = [_key(chosen)]
    found = []
    for item in items:
        if _key(item) not in told:
            told.append(_key(item))
            found.append(item)
    return found


def _key(item: Decision) -> Any:
    return dict(item.placement), item.decode, dict(item.weights), dict(item.execution)
