"""The answer of `fit`: rows, smallest cards, largest workloads."""

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
    """One model on one card: how it would run, or `reason`, why not.

    `device` is a profile's name or the driver's, None without one; `alike` are the other profiles of that memory,
    none of which has less. `confirmed` says whether the plan was simulated within the budget, or only priced.
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
    """The smallest card that a model runs on where so much may be done to the picture (the row says how much is), and
    the least VRAM that it can be brought down to there by preferring memory to speed, by price. None where no card is
    large enough."""

    model: str
    allow: Quality
    row: Row | None
    least_vram_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Largest:
    """Of what the largest was looked for, and the next legal workload with what it lacks; None where the most that is
    looked for fits."""

    dimension: Dimension
    next: Row | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fits(Shown):
    """The answer: a row for each card, model or largest workload, and whether anything fits at all."""

    schema_version: int = FIT_SCHEMA_VERSION
    question: Question
    asked: Preferences
    fits: bool
    rows: tuple[Row, ...]
    smallest: tuple[Smallest, ...] = ()
    largest: tuple[Largest, ...] = ()
