"""The result types of `fit`: rows, smallest cards, largest workloads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vramplan.common.shown import Shown
from vramplan.planfile.types import Preferences, Projected, Settings
from vramplan.planner.legal import Dimension
from vramplan.strategies.base import Quality
from vramplan.workload import Workload

FIT_SCHEMA_VERSION = 1
Question = Literal["cards", "largest", "models"]
Try = Callable[..., "Row"]
Shortfall = Callable[[Workload], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model on one card: how it would run, or the `reason` why it does not.

    `device` is a profile's name or the driver's, None without one; `alike` are the other profiles of that size, none
    with less memory. `confirmed` says whether the plan was simulated within the budget, or only priced.
    """

    model: str
    workload: Workload
    device: str | None
    memory_bytes: int | None
    alike: tuple[str, ...] = ()
    fits: bool
    confirmed: bool = False
    reason: str = ""
    vram_budget_bytes: int | None = None
    settings: Settings | None = None
    quality: Quality | None = None
    projected: Projected | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Smallest:
    """The smallest card that runs a model if `allow` is the worst quality allowed (the row has the actual quality).

    `least_vram_bytes` is the least VRAM the model can be limited to there, preferring memory to speed, by price. Row
    and bytes are None if no card is large enough."""

    model: str
    allow: Quality
    row: Row | None
    least_vram_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Largest:
    """The dimension that was maximised, and the next legal workload with its shortfall; None if the largest one tried
    fits."""

    dimension: Dimension
    next: Row | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fits(Shown):
    """The result of `fit`: a row for each card, model or largest workload, and whether anything fits at all."""

    schema_version: int = FIT_SCHEMA_VERSION
    question: Question
    asked: Preferences
    fits: bool
    rows: tuple[Row, ...]
    smallest: tuple[Smallest, ...] = ()
    largest: tuple[Largest, ...] = ()
