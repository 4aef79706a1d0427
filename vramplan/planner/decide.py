"""Keep the fastest candidate that fits, and a sentence on why each other one was not taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from vramplan.errors import NothingFitsError, UsageError
from vramplan.hardware.types import Accelerator, Budget
from vramplan.pipeline.types import PipelineSpec
from vramplan.planner.candidates import CandidatePool, CandidateRow, Refused, rows
from vramplan.planner.demand import Demand, Pricer, shortage
from vramplan.planner.fixed import Fixed
from vramplan.planner.footprint import Footprint
from vramplan.planner.order import Prefer, Verdict, order, rounded
from vramplan.planner.table import Table
from vramplan.planner.unlock import unlocks
from vramplan.strategies.base import QUALITIES, Decode, Execution, Placement, Quality, Weights
from vramplan.strategies.resident import Resident
from vramplan.strategies.settings import format_setting
from vramplan.units import MIB, format_bytes, format_seconds
from vramplan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A candidate, its price, and what became of it. `deficit_bytes` is 0 where it fits."""

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
        """That of its least faithful setting."""
        return self.quality_beside({})

    def quality_beside(self, told: Mapping[str, tuple[Execution, ...]]) -> Quality:
        """That of its least faithful setting, what was told of attention and compiling by hand left out."""
        execution = [item for name, items in self.execution.items() for item in items if item not in told.get(name, ())]
        return worst_quality([*self.weights.values(), *execution, *self.placement.values(), *self.decode])


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
# One more simulation is made for a plan that would take at most this share of the time.
_WORTH_A_TRY = 0.99
# Candidates nearer to one another than this are not told apart: the least that torch's allocator takes for more.
_STEP_BYTES = 20 * MIB
# What may be chosen when the user said nothing: the second only where the first has nothing that fits.
_LAST_RESORT: tuple[Quality, ...] = ("lossless", "near_lossless")


def worst_quality(settings: Sequence[Weights | Placement | Decode | Execution]) -> Quality:
    """The least faithful quality among settings."""
    return max((setting.quality for setting in settings), key=QUALITIES.index, default="lossless")


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """The pipeline with something done to its weights or attention: that, its components then, what they need."""

    weights: Mapping[str, Weights]
    execution: Mapping[str, tuple[Execution, ...]] = field(default_factory=dict)
    spec: PipelineSpec
    footprint: Footprint


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
    alternatives: Sequence[Alternative] = (),
) -> Outcome:
    """Price every candidate and choose.

    `alternatives` are other forms of the pipeline's weights and attention to consider; where `fixed` names weights, the
    only ones.

    With `allow` None only lossless candidates are taken, and tiling where no lossless one fits: a decode
    that cannot be tiled cannot be run at all. With `allow` given, the fastest up to that quality is.
    `confirm` has the last word on a candidate that fits by its price: it returns the decision with what it
    found, with a deficit where it does not fit after all. Assumed prices are not worth confirming.

    Raises:
        NothingFitsError: with the deficit of the nearest candidate.
        UsageError: a setting fixed by hand that cannot be.
    """
    stored = Alternative(weights={}, execution=fixed.execution, spec=spec, footprint=footprint)
    found: list[CandidateRow] = []
    refused: list[Refused] = []
    pricers = []
    for form in alternatives if fixed.weights else (stored, *alternatives):
        ours, not_ours = rows(form.spec, workload, fixed, accelerator)
        found += [replace(row, weights=form.weights, execution=form.execution) for row in ours]
        refused += [item for item in not_ours if item not in refused]
        pricers.append((form, Pricer(form.spec, workload, form.footprint, accelerator)))
    if not found:
        raise UsageError(_impossible(refused, fixed))
    chooser = _Chooser(pricers, budget, prefer, fixed)
    pool = [(row, chooser.best(row)) for row in found]
    default = (*_LAST_RESORT, "lossy") if fixed.weights else _LAST_RESORT  # what is set by hand is allowed
    for limit in (allow,) if allow else default:
        chosen, pool = _first_confirmed(pool, limit, chooser, confirm)
        if chosen is not None:
            others = [_told(item, chosen, limit, chooser) for _, item in pool if item is not chosen]
            others.sort(key=lambda item: (item.verdict == "rejected", item.deficit_bytes, rank(item, prefer)))
            if prefer == "memory":
                told = _smallest(chosen, chooser.seconds_of_fastest(found, limit))
            else:
                told = _choose(chosen, others, lambda demand: unlocks(demand, budget, spec, workload, accelerator))
            return Outcome(decisions=(told, *others), refused=tuple(refused))
    raise NothingFitsError(_nothing_fits([item for _, item in pool], allow))


@dataclass(frozen=True, slots=True)
class _Chooser:
    """Finds the best candidate of a row within a budget."""

    pricers: Sequence[tuple[Alternative, Pricer]]
    budget: Budget
    prefer: Prefer
    fixed: Fixed
    tables: dict[tuple[int, int], Table] = field(default_factory=dict)

    def asks_for(self, item: Decision) -> int:
        """The place of the quality that has to be allowed for it: what was set by hand is."""
        return QUALITIES.index(item.quality_beside(self.fixed.execution))

    def best(self, row: CandidateRow, vram_bytes: int | None = None) -> Decision:
        """The best of the row, within less VRAM than the budget's where that is given."""
        limit = self.budget.vram_bytes if vram_bytes is None else vram_bytes
        budget = replace(self.budget, vram_bytes=limit)
        of_row = ((form.weights, form.execution) == (row.weights, row.execution) for form, _ in self.pricers)
        pricer = next(pricer for (_, pricer), its in zip(self.pricers, of_row, strict=True) if its)
        best = (self._best_of(pool, pricer, row.decode, budget) for pool in row.pools)
        judged = (_judge(row, placement, pricer(placement, row.decode), budget) for placement in best)
        return min(judged, key=lambda item: (item.deficit_bytes, *rank(item, self.prefer)))

    def seconds_of_fastest(self, among: Iterable[CandidateRow], limit: Quality) -> float:
        """Seconds of a call of the fastest candidate that fits by its price and is allowed."""
        best = map(replace(self, prefer="speed").best, among)
        able = (item for item in best if not item.deficit_bytes and self.asks_for(item) <= QUALITIES.index(limit))
        return min((item.demand.seconds_per_call for item in able), default=inf)

    def _best_of(
        self, pool: CandidatePool, pricer: Pricer, decode: tuple[Decode, ...], budget: Budget
    ) -> Mapping[str, Placement]:
        """The best placement of a pool: its only one, or that of a table of all, made when it is first asked for."""
        if all(len(axis) == 1 for axis in pool.axes):
            return pool.mix(axis[0] for axis in pool.axes)
        key = id(pool), id(pricer)
        if key not in self.tables:
            self.tables[key] = Table(pool, pricer, decode)
        return self.tables[key].best(decode, budget, self.prefer)


def _impossible(refused: Sequence[Refused], fixed: Fixed) -> str:
    """Why nothing is left: the reasons against what was set by hand, or all of them where nothing was."""
    told = [fixed.everywhere, *fixed.placement.values(), *(fixed.decode or ())]
    texts = {format_setting(setting) for setting in told if setting is not None}
    ours = [item for item in refused if item.setting in texts] or refused
    reasons = dict.fromkeys(f"{item.setting}: {item.reason}" for item in ours)
    return "; ".join(reasons) or "no combination of these settings is possible"


def _first_confirmed(
    pool: Sequence[tuple[CandidateRow, Decision]], limit: Quality, chooser: _Chooser, confirm: Confirm | None
) -> tuple[Decision | None, list[tuple[CandidateRow, Decision]]]:
    """The best decision that fits and is confirmed, and all of them with what confirming found out.

    One that is not confirmed gives way to the next best of its row within as much less as it was short by, and so do
    all that decode alike; those that were priced at as much or more are ruled out with it: they would fare no better.
    Once something fits, what was passed over is tried as far as it is faster. Where nothing does, every row is tried
    again from just below what failed, as memory lies in pieces that differ with the kind of placement.
    """
    done: list[tuple[CandidateRow, Decision]] = []
    waiting = list(pool)
    every = {id(row): row for row, _ in pool}.values()
    lowest: dict[tuple[Decode, ...], Decision] = {}  # of those that failed the one priced lowest
    bold, most = True, QUALITIES.index(limit)
    while True:
        able = [entry for entry in waiting if entry[1].verdict == "fits" and chooser.asks_for(entry[1]) <= most]
        if not able and bold and lowest:
            bold = False
            again = [(row, chooser.best(row, _vram(lowest[row.decode]) - 1)) for row in every if row.decode in lowest]
            again = [entry for entry in again if not entry[1].deficit_bytes]
            waiting = [entry for entry in waiting if all(entry[0] is not row for row, _ in again)] + again
            continue
        if not able:
            return None, [*done, *waiting]
        row, item = entry = min(able, key=lambda entry: rank(entry[1], chooser.prefer))
        if confirm is None or item.demand.basis in ("assumed", "derived"):
            return item, [*done, *waiting]
        waiting.remove(entry)
        found = confirm(item)
        done.append((row, found))
        if found.verdict != "rejected":
            best = _one_more_rung(row, item, found, lowest.get(row.decode), chooser, confirm)
            for other in every:
                if other.decode in lowest:
                    best = _between(other, lowest[other.decode], best, limit, chooser, confirm)
            return best, [*done, *waiting]
        if not found.deficit_bytes:
            continue  # it cannot run at all, which says nothing of its neighbours
        lowest[row.decode] = item
        within = _vram(item) - (found.deficit_bytes if bold else 1)
        waiting = [
            _below(other, within, found, chooser) if other[0].decode == row.decode else other for other in waiting
        ]
        smaller = chooser.best(row, _vram(item) - found.deficit_bytes)
        waiting += [(row, smaller)] if not smaller.deficit_bytes else []


def _vram(item: Decision) -> int:
    return item.demand.vram_reserved_bytes


def _one_more_rung(
    row: CandidateRow, priced: Decision, found: Decision, failed: Decision | None, chooser: _Chooser, confirm: Confirm
) -> Decision:
    """A faster one of the row that fits after all, where simulating found less than was priced; else what was found."""
    spare = _vram(priced) - _vram(found)
    limit = chooser.budget.vram_bytes
    if spare <= 0 or limit is None:
        return found
    higher = chooser.best(row, limit + spare)
    if not _worth_a_try(higher, found) or (failed is not None and _vram(higher) >= _vram(failed)):
        return found
    tried = confirm(higher)
    return found if tried.verdict == "rejected" else tried


def _between(
    row: CandidateRow, failed: Decision, found: Decision, limit: Quality, chooser: _Chooser, confirm: Confirm
) -> Decision:
    """One of the row that was priced at less than what failed and is faster than what was found, by halving."""
    low, high = 0, _vram(failed)
    while True:
        top = chooser.best(row, high - 1)
        if not _worth_a_try(top, found) or _vram(top) <= low or chooser.asks_for(top) > QUALITIES.index(limit):
            return found
        half = (low + _vram(top)) // 2
        middle = chooser.best(row, half)
        if not _worth_a_try(middle, found):
            if _vram(top) - low > _STEP_BYTES:
                low = half
                continue
            middle = top
        tried = confirm(middle)
        if tried.verdict == "rejected":
            high = _vram(middle)
        else:
            found, low = tried, _vram(middle)


def _worth_a_try(other: Decision, found: Decision) -> bool:
    return not other.deficit_bytes and other.demand.seconds_per_call <= found.demand.seconds_per_call * _WORTH_A_TRY


def _below(
    entry: tuple[CandidateRow, Decision], vram_bytes: int, failed: Decision, chooser: _Chooser
) -> tuple[CandidateRow, Decision]:
    """The entry where it needs no more than that, else the best of its row that does, else the entry ruled out."""
    row, item = entry
    if item.deficit_bytes or _vram(item) <= vram_bytes:
        return entry
    smaller = chooser.best(row, vram_bytes)
    if not smaller.deficit_bytes:
        return row, smaller
    reason = (
        f"projected at {format_bytes(_vram(item))} of VRAM, and one that was projected at {format_bytes(_vram(failed))}"
        f" was short by {format_bytes(failed.deficit_bytes)} when it was simulated"
    )
    short = failed.deficit_bytes + max(0, _vram(item) - _vram(failed))
    return row, replace(item, verdict="rejected", reason=reason, deficit_bytes=short)


def _judge(row: CandidateRow, placement: Mapping[str, Placement], demand: Demand, budget: Budget) -> Decision:
    short = shortage(demand, budget)
    return Decision(
        placement=placement,
        decode=row.decode,
        weights=row.weights,
        execution=row.execution,
        demand=demand,
        verdict="rejected" if short else "fits",
        reason=short[1] if short else "",
        deficit_bytes=short[0] if short else 0,
    )


def rank(decision: Decision, prefer: Prefer) -> tuple[float, ...]:
    """Lower is better (`order`)."""
    demand = decision.demand
    compared = order(
        prefer,
        seconds=demand.seconds_per_call,
        quality=QUALITIES.index(decision.quality),
        changed=len(decision.weights),
        offloaded=sum(setting != Resident() for setting in decision.placement.values()),
        ram_bytes=demand.ram_bytes,
        vram_bytes=demand.vram_reserved_bytes,
    )
    return tuple(rounded(value, digits) for value, digits in compared)


def _told(item: Decision, chosen: Decision, limit: Quality, chooser: _Chooser) -> Decision:
    """A candidate that was not chosen, with the reason."""
    if item.verdict == "rejected":
        return item
    if chooser.asks_for(item) > QUALITIES.index(limit):
        gain = chosen.demand.seconds_per_call / max(item.demand.seconds_per_call, 1e-9)
        buys = f", {gain:.1f}x as fast" if gain > 1.05 else ""
        words = item.quality.replace("_", " ")
        return _with(item, "rejected", f'fits{buys}, but is only {words}: `allow="{item.quality}"`')
    if chooser.prefer == "memory":
        more = item.demand.vram_reserved_bytes - chosen.demand.vram_reserved_bytes
        return _with(item, "fits", f"{format_bytes(max(0, more))} more memory than the chosen one")
    slower = item.demand.seconds_per_call / max(chosen.demand.seconds_per_call, 1e-9)
    return _with(item, "fits", f"{slower:.2f}x the time of the chosen one")


def _choose(chosen: Decision, others: Sequence[Decision], changes: Callable[[Demand], list[str]]) -> Decision:
    """The chosen decision, told: what it is best at, what the next faster one lacks, and what would give it that."""
    seconds = chosen.demand.seconds_per_call
    faster = [item for item in others if item.verdict == "rejected" and item.demand.seconds_per_call < seconds * 0.95]
    if not faster:
        return _with(chosen, "chosen", "the fastest of all candidates, and it fits")
    nearest = min(faster, key=lambda item: item.deficit_bytes)
    short = [item for item in faster if item.deficit_bytes]
    told = f"the fastest that fits; a faster one: {nearest.reason}"
    if short:
        demand = min(short, key=lambda item: item.deficit_bytes).demand
        ways = " or ".join(changes(demand))
        told += f"; {seconds / max(demand.seconds_per_call, 1e-9):.1f}x as fast with {ways}" if ways else ""
    return _with(chosen, "chosen", told)


def _smallest(chosen: Decision, fastest: float) -> Decision:
    """The chosen decision where memory is preferred, with how much slower it is than the fastest that fits."""
    slower = chosen.demand.seconds_per_call / max(fastest, 1e-9)
    time = "none that fits is faster"
    if rounded(slower, 3) > 1:
        more = max(1, round((slower - 1) * 100))
        time = f"{more}% slower than the fastest that fits ({format_seconds(fastest)} a call)"
    return _with(chosen, "chosen", f"takes the least memory of all that fit; {time}")


def _with(item: Decision, verdict: Verdict, reason: str) -> Decision:
    return replace(item, verdict=verdict, reason=reason)


def _nothing_fits(decisions: Sequence[Decision], allow: Quality | None) -> str:
    nearest = min(decisions, key=lambda item: item.deficit_bytes)
    if nearest.verdict == "rejected":
        return f"nothing fits; the nearest candidate: {nearest.reason}"
    return f'nothing {(allow or "lossless").replace("_", " ")} fits; `allow="{nearest.quality}"` would'
