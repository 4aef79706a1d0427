"""The data of a picture of a plan's candidates, independent of the drawing library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vramplan.calibration.records import Usage
from vramplan.errors import VramplanError
from vramplan.planfile.types import Considered, Plan, settings_text
from vramplan.units import GIB
from vramplan.view.plot.colours import CHOSEN, FITS, MEASURED, NEUTRAL, TOO_LARGE

_LONG = 300  # seconds above which the longest call switches the axis to minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class Dots:
    """Candidates of one verdict: times of a call, GiB reserved, and the settings and reason of each."""

    name: str
    colour: str
    symbol: str
    times: Sequence[float]
    sizes: Sequence[float]
    settings: Sequence[str]
    reasons: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidatesPicture:
    """Time against the peak of `memory`: VRAM, or RAM without an accelerator; `budget` is its limit in GiB.

    Times of the groups are in `unit`: seconds, or minutes for long calls.
    """

    title: str
    groups: Sequence[Dots]
    memory: str
    budget: float
    unit: str
    logarithmic: bool


def candidates_picture(plan: Plan, measured: Usage | None = None) -> CandidatesPicture:
    """The picture of a plan's candidates, with the measured call of the chosen one, if given.

    Raises:
        VramplanError: the plan lists no candidates.
    """
    if not plan.candidates:
        raise VramplanError("this plan lists no candidates to draw: make the plan again")
    memory = "RAM" if plan.machine.budget.vram_bytes is None else "VRAM"
    budget = plan.machine.budget.vram_bytes or plan.machine.budget.ram_bytes
    chosen = [item for item in plan.candidates if item.verdict == "chosen"]
    fits = [item for item in plan.candidates if item.verdict == "fits"]
    rejected = [item for item in plan.candidates if item.verdict == "rejected"]
    too_large = [item for item in rejected if _size(item, memory) > budget]
    others = [item for item in rejected if item not in too_large]
    seconds = [item.projected.seconds_per_call for item in plan.candidates]
    unit, scale = ("minutes", 60) if max(seconds) > _LONG else ("seconds", 1)
    groups = [
        _dots("fits", FITS, "o", fits, memory, scale),
        _dots(f"too much {memory}", TOO_LARGE, "x", too_large, memory, scale),
        _dots("rejected otherwise", NEUTRAL, "+", others, memory, scale),
        _dots("chosen", CHOSEN, "*", chosen, memory, scale),
    ]
    took = measured and (measured.ram_bytes if memory == "RAM" else measured.vram_reserved_bytes)
    if measured and took:
        groups.append(
            Dots(
                name="the chosen one, measured", colour=MEASURED, symbol="D",
                times=[measured.seconds_per_call / scale], sizes=[took / GIB],
                settings=[settings_text(plan.settings)], reasons=["a real call on this machine"],
            )
        )  # fmt: skip
    card = plan.machine.accelerator.name if plan.machine.accelerator else "the CPU"
    return CandidatesPicture(
        title=f"{len(plan.candidates)} candidates for {plan.model.class_name} on {card}",
        groups=[group for group in groups if group.times],
        memory=memory,
        budget=budget / GIB,
        unit=unit,
        logarithmic=min(seconds) > 0 and max(seconds) > 5 * min(seconds),
    )


def _dots(name: str, colour: str, symbol: str, found: Sequence[Considered], memory: str, scale: int) -> Dots:
    return Dots(
        name=name,
        colour=colour,
        symbol=symbol,
        times=[item.projected.seconds_per_call / scale for item in found],
        sizes=[_size(item, memory) / GIB for item in found],
        settings=[settings_text(item.settings) for item in found],
        reasons=[item.reason for item in found],
    )


def _size(item: Considered, memory: str) -> int:
    return item.projected.ram_bytes if memory == "RAM" else item.projected.vram_reserved_bytes
