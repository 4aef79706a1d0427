"""What a picture of a plan's candidates shows, whatever draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vramplan.errors import VramplanError
from vramplan.planfile import Considered, Plan
from vramplan.plot.colours import CHOSEN, FITS, NEUTRAL, TOO_LARGE
from vramplan.report import settings_text
from vramplan.units import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Dots:
    """Candidates of one verdict: seconds a call, GiB reserved, and the settings and reason of each."""

    name: str
    colour: str
    symbol: str
    seconds: Sequence[float]
    sizes: Sequence[float]
    settings: Sequence[str]
    reasons: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidatesPicture:
    """Time against the peak of `memory`: VRAM, or RAM without an accelerator. Below `budget`, in GiB, it is enough."""

    title: str
    groups: Sequence[Dots]
    memory: str
    budget: float
    logarithmic: bool


def candidates_picture(plan: Plan) -> CandidatesPicture:
    """The picture of a plan's candidates. Raises VramplanError for a plan without any."""
    if not plan.candidates:
        raise VramplanError("this plan lists no candidates to draw: make it again with vramplan plan")
    memory = "RAM" if plan.machine.budget.vram_bytes is None else "VRAM"
    budget = plan.machine.budget.vram_bytes or plan.machine.budget.ram_bytes
    chosen = [item for item in plan.candidates if item.verdict == "chosen"]
    fits = [item for item in plan.candidates if item.verdict == "fits"]
    rejected = [item for item in plan.candidates if item.verdict == "rejected"]
    too_large = [item for item in rejected if _size(item, memory) > budget]
    others = [item for item in rejected if item not in too_large]
    groups = (
        _dots("fits", FITS, "o", fits, memory),
        _dots(f"too much {memory}", TOO_LARGE, "x", too_large, memory),
        _dots("rejected otherwise", NEUTRAL, "+", others, memory),
        _dots("chosen", CHOSEN, "*", chosen, memory),
    )
    seconds = [item.projected.seconds_per_call for item in plan.candidates]
    card = plan.machine.accelerator.name if plan.machine.accelerator else "the CPU"
    return CandidatesPicture(
        title=f"{len(plan.candidates)} candidates for {plan.model.class_name} on {card}",
        groups=[group for group in groups if group.seconds],
        memory=memory,
        budget=budget / GIB,
        logarithmic=min(seconds) > 0 and max(seconds) > 5 * min(seconds),
    )


def _dots(name: str, colour: str, symbol: str, found: Sequence[Considered], memory: str) -> Dots:
    return Dots(
        name=name,
        colour=colour,
        symbol=symbol,
        seconds=[item.projected.seconds_per_call for item in found],
        sizes=[_size(item, memory) / GIB for item in found],
        settings=[settings_text(item.settings) for item in found],
        reasons=[item.reason for item in found],
    )


def _size(item: Considered, memory: str) -> int:
    return item.projected.ram_bytes if memory == "RAM" else item.projected.vram_reserved_bytes
