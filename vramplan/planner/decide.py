"""Keep the fastest candidate that fits, and a sentence on why each other one was not taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vramplan.errors import NothingFitsError, UsageError
from vramplan.hardware.types import Accelerator, Budget
from vramplan.pipeline.types import PipelineSpec
from vramplan.planner.candidates import Fixed, Refused, rows
from vramplan.planner.demand import Demand, price
from vramplan.planner.footprint import Footprint
from vramplan.strategies.base import QUALITIES, Decode, Placement, Quality
from vramplan.strategies.settings import format_setting
from vramplan.units import format_bytes
from vramplan.workload import Workload

Verdict = Literal["chosen", "fits", "rejected"]
Prefer = Literal["speed", "memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A candidate, its price, and what became of it. `deficit_bytes` is 0 where it fits."""

    placement: Mapping[str, Placement]
    decode: tuple[Decode, ...]
    demand: Demand
    verdict: Verdict
    reason: str
    deficit_bytes: int

    @property
    def quality(self) -> Quality:
        """That of its least faithful setting."""
        return worst_quality([*self.placement.values(), *self.decode])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Every decision, the chosen one first, and the settings that could not be candidates at all."""

    decisions: tuple[Decision, ...]
    refused: tuple[Refused, ...]

    @property
    def chosen(self) -> Decision:
        """The decision the plan is made of."""
        return self.decisions[0]


Confirm = Callable[[Decision], Decision]
# What may be chosen when the user said nothing: the second only where the first has nothing that fits.
_LAST_RESORT: tuple[Quality, ...] = ("lossless", "near_lossless")


def worst_quality(settings: Sequence[Placement | Decode]) -> Quality:
    """The least faithful quality among settings."""
    return max((setting.quality for setting in settings), key=QUALITIES.index, default="lossless")


def decide(
    spec: PipelineSpec,
    workload: Workload,
    budget: Budget,
    *,
    accelerator: Accelerator | None,
    footprint: Footprint,
    fixed: Fixed,
    allow: Quality | None = None,
    prefer: Prefer = "speed",
    confirm: Confirm | None = None,
) -> Outcome:
    """Price every candidate and choose.

    With `allow` None only lossless candidates are taken, and tiling where no lossless one fits: a decode
    that cannot be tiled cannot be run at all. With `allow` given, the fastest up to that quality is.
    `confirm` has the last word on a candidate that fits by its price: it returns the decision with what it
    found, with a deficit where it does not fit after all. Assumed prices are not worth confirming.

    Raises:
        NothingFitsError: with the deficit of the nearest candidate.
        UsageError: a setting fixed by hand that cannot be.
    """
    found, refused = rows(spec, workload, fixed, accelerator)
    if not found:
        raise UsageError(_impossible(refused, fixed))

    def best(placements: Sequence[Mapping[str, Placement]], decode: tuple[Decode, ...]) -> Decision:
        def judged(placement: Mapping[str, Placement]) -> Decision:
            demand = price(spec, workload, placement, decode, footprint=footprint, accelerator=accelerator)
            return _judge(placement, decode, demand, budget)

        return min(map(judged, placements), key=lambda item: (item.deficit_bytes, *_rank(item, prefer)))

    decisions = [best(row.placements, row.decode) for row in found]
    for limit in (allow,) if allow else _LAST_RESORT:
        chosen, decisions = _first_confirmed(decisions, limit, prefer, confirm)
        if chosen is not None:
            others = [_told(item, chosen, limit, prefer) for item in decisions if item is not chosen]
            others.sort(key=lambda item: (item.verdict == "rejected", item.deficit_bytes, _rank(item, prefer)))
            return Outcome(decisions=(_choose(chosen, others), *others), refused=tuple(refused))
    raise NothingFitsError(_nothing_fits(decisions, allow))


def _impossible(refused: Sequence[Refused], fixed: Fixed) -> str:
    """Why nothing is left: the reasons against what was set by hand, or all of them where nothing was."""
    told = [fixed.everywhere, *fixed.placement.values(), *(fixed.decode or ())]
    texts = {format_setting(setting) for setting in told if setting is not None}
    ours = [item for item in refused if item.setting in texts] or refused
    reasons = dict.fromkeys(f"{item.setting}: {item.reason}" for item in ours)
    return "; ".join(reasons) or "no combination of these settings is possible"


def _first_confirmed(
    decisions: Sequence[Decision], limit: Quality, prefer: Prefer, confirm: Confirm | None
) -> tuple[Decision | None, list[Decision]]:
    """The best decision that fits and is confirmed, and all of them with what confirming found out.

    One that is not confirmed also rules out those priced at as much memory or more: they would fare no better.
    """
    known = list(decisions)
    ceiling: int | None = None
    for item in sorted(decisions, key=lambda decision: _rank(decision, prefer)):
        if item.deficit_bytes or _index(item) > QUALITIES.index(limit):
            continue
        if confirm is None or item.demand.basis == "assumed":
            return item, known
        if ceiling is not None and item.demand.vram_reserved_bytes >= ceiling:
            continue
        found = confirm(item)
        known[known.index(item)] = found
        if not found.deficit_bytes:
            return found, known
        ceiling = item.demand.vram_reserved_bytes
    return None, known


def _judge(placement: Mapping[str, Placement], decode: tuple[Decode, ...], demand: Demand, budget: Budget) -> Decision:
    short = _shortage(demand, budget)
    return Decision(
        placement=placement,
        decode=decode,
        demand=demand,
        verdict="rejected" if short else "fits",
        reason=short[1] if short else "",
        deficit_bytes=short[0] if short else 0,
    )


def _shortage(demand: Demand, budget: Budget) -> tuple[int, str] | None:
    """By how much the candidate is short in all, and the sentences that say so with both numbers."""
    found = []
    if budget.vram_bytes is not None and demand.vram_reserved_bytes > budget.vram_bytes:
        phase = max(demand.phases, key=lambda item: item.reserved_bytes)
        where = f"{phase.name} ({phase.component})"
        found.append(_short(where, "VRAM", demand.vram_reserved_bytes, budget.vram_bytes))
    if demand.ram_bytes > budget.ram_bytes:
        found.append(_short("the plan", "RAM", demand.ram_bytes, budget.ram_bytes))
    return (sum(size for size, _ in found), "; ".join(text for _, text in found)) if found else None


def _short(where: str, memory: str, needed: int, usable: int) -> tuple[int, str]:
    deficit = needed - usable
    return deficit, (
        f"{where} needs {format_bytes(needed)} of {memory}, {format_bytes(usable)} may be used: "
        f"short by {format_bytes(deficit)}"
    )


def _rank(decision: Decision, prefer: Prefer) -> tuple[float, ...]:
    """Lower is better. Times are equal up to their third digit; then less to hide, then memory decides.

    RAM before VRAM: of two that are equally fast the one that offloads less is the simpler.
    """
    demand = decision.demand
    time, vram = float(f"{demand.seconds_per_call:.3g}"), demand.vram_reserved_bytes
    hidden = float(f"{demand.transfer_seconds_per_step:.3g}")
    if prefer == "speed":
        return time, _index(decision), hidden, demand.ram_bytes, vram
    return vram or demand.ram_bytes, time, _index(decision), hidden, demand.ram_bytes


def _index(decision: Decision) -> int:
    return QUALITIES.index(decision.quality)


def _told(item: Decision, chosen: Decision, limit: Quality, prefer: Prefer) -> Decision:
    """A candidate that was not chosen, with the reason."""
    if item.deficit_bytes:
        return item
    if _index(item) > QUALITIES.index(limit):
        gain = chosen.demand.seconds_per_call / max(item.demand.seconds_per_call, 1e-9)
        buys = f", {gain:.1f}x as fast" if gain > 1.05 else ""
        words = item.quality.replace("_", " ")
        return _with(item, "rejected", f"fits{buys}, but is only {words}: --allow {item.quality}")
    if prefer == "memory":
        more = item.demand.vram_reserved_bytes - chosen.demand.vram_reserved_bytes
        return _with(item, "fits", f"{format_bytes(max(0, more))} more memory than the chosen one")
    slower = item.demand.seconds_per_call / max(chosen.demand.seconds_per_call, 1e-9)
    return _with(item, "fits", f"{slower:.2f}x the time of the chosen one")


def _choose(chosen: Decision, others: Sequence[Decision]) -> Decision:
    """The chosen decision, told: what it is best at, and what the next faster one lacks."""
    faster = [
        item
        for item in others
        if item.verdict == "rejected" and item.demand.seconds_per_call < chosen.demand.seconds_per_call * 0.95
    ]
    if not faster:
        return _with(chosen, "chosen", "the fastest of all candidates, and it fits")
    nearest = min(faster, key=lambda item: item.deficit_bytes)
    return _with(chosen, "chosen", f"the fastest that fits; a faster one: {nearest.reason}")


def _with(item: Decision, verdict: Verdict, reason: str) -> Decision:
    return replace(item, verdict=verdict, reason=reason)


def _nothing_fits(decisions: Sequence[Decision], allow: Quality | None) -> str:
    nearest = min(decisions, key=lambda item: item.deficit_bytes)
    if nearest.deficit_bytes:
        return f"nothing fits; the nearest candidate: {nearest.reason}"
    return f"nothing {(allow or 'lossless').replace('_', ' ')} fits; --allow {nearest.quality} would"
