"""Choose the best candidate that fits, and give a reason for each of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from vramplan.errors import NothingFitsError, UsageError
from vramplan.hardware.types import Accelerator, Budget
from vramplan.pipeline.types import PipelineSpec
from vramplan.planner.budget import Budgets
from vramplan.planner.candidates import CandidateRow, Refused, rows, why_impossible
from vramplan.planner.decision import Decision, Outcome, distinct, first_decision, rank
from vramplan.planner.demand import Demand, Pricer, shortage
from vramplan.planner.fixed import Fixed
from vramplan.planner.footprint import Footprint
from vramplan.planner.order import Prefer, Verdict, rounded, surely_faster
from vramplan.planner.pool import CandidatePool
from vramplan.planner.streaming import with_finer_numbers, with_more_kept
from vramplan.planner.table import Table
from vramplan.planner.unlock import unlocks
from vramplan.strategies.base import QUALITIES, Decode, Execution, Placement, Quality, Weights
from vramplan.units import MIB, format_bytes, format_seconds
from vramplan.workload import Workload

Confirm = Callable[[Decision], Decision]
Entry = tuple[CandidateRow, Decision]
# A faster plan is worth one more simulation if it takes at most this share of the time.
_WORTH_TRYING = 0.99
# The smallest difference in bytes worth a simulation: the size of a segment of torch's allocator.
_STEP_BYTES = 20 * MIB
# After a failure at least this share less is tried: where memory is free in pieces too small, no more is known.
_STEP_SHARE = 0.02
# The qualities tried in turn if the user allowed none.
_DEFAULT: tuple[Quality, ...] = ("lossless", "near_lossless")


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """The pipeline under other settings of weights or attention: the settings, its spec, and its footprint."""

    weights: Mapping[str, Weights]
    execution: Mapping[str, tuple[Execution, ...]] = field(default_factory=dict)
    spec: PipelineSpec
    footprint: Footprint


def decide(
    spec: PipelineSpec,
    workload: Workload,
    budget: Budget,
    *,
    quantized_budget: Budget | None = None,
    accelerator: Accelerator | None,
    footprint: Footprint,
    fixed: Fixed,
    allow: Quality | None = None,
    prefer: Prefer = "speed",
    confirm: Confirm | None = None,
    alternatives: Sequence[Alternative] = (),
) -> Outcome:
    """Price every candidate and choose.

    `quantized_budget` is for candidates that change the weights; by default it is the budget of all others.
    `alternatives` are further forms of the pipeline; if `fixed` names weights, they are the only forms considered.
    With `allow`, the best candidate up to that quality is taken. With None only lossless ones are, and near lossless
    ones (tiling) if no lossless one fits. `confirm` checks a candidate that fits by its price: it returns the decision
    with simulated figures, or rejected. Assumed prices are not confirmed.

    Raises:
        NothingFitsError: nothing fits; gives the deficit of the nearest candidate.
        UsageError: a setting that the user fixed is impossible.
    """
    stored = Alternative(weights={}, execution=fixed.execution, spec=spec, footprint=footprint)
    found: list[CandidateRow] = []
    refused: list[Refused] = []
    pricers = []
    for form in alternatives if fixed.weights else (stored, *alternatives):
        possible, impossible = rows(form.spec, workload, fixed, accelerator, ram_bytes=budget.ram_bytes)
        found += [replace(row, weights=form.weights, execution=form.execution) for row in possible]
        refused += [item for item in impossible if item not in refused]
        pricers.append((form, Pricer(form.spec, workload, form.footprint, accelerator)))
    if not found:
        raise UsageError(why_impossible(refused, fixed))
    budgets = Budgets(stored=budget, quantized=quantized_budget or budget)

    def unlocking(item: Decision) -> list[str]:
        return unlocks(item.demand, budgets.of(item.weights), spec, workload, accelerator)

    chooser = _Chooser(pricers, budgets, prefer, fixed)
    check = confirm or (lambda item: item)
    entries = [(row, chooser.best(row)) for row in found]
    default = (*_DEFAULT, "lossy") if fixed.weights else _DEFAULT  # fixed settings are allowed
    for limit in (allow,) if allow else default:
        search = _Search(entries, limit, chooser, check)
        chosen, entries = search.run(), [*search.simulated, *search.waiting]
        if chosen is not None:
            rest = distinct([item for _, item in entries if item is not chosen], chosen)
            others = [_explain_other(item, chosen, limit, chooser) for item in rest]
            others.sort(key=lambda item: (item.verdict == "rejected", item.deficit_bytes, rank(item, prefer)))
            if prefer == "memory":
                chosen = _explain_smallest(chosen, chooser.seconds_of_fastest(found, limit))
            else:
                chosen = _explain_fastest(chosen, others, unlocking)
            return Outcome(decisions=(chosen, *others), refused=tuple(refused))
    raise NothingFitsError(_nothing_fits([item for _, item in entries], allow))


@dataclass(frozen=True, slots=True)
class _Chooser:
    """Finds the best candidate of a row within its budget."""

    pricers: Sequence[tuple[Alternative, Pricer]]
    budgets: Budgets
    prefer: Prefer
    fixed: Fixed
    tables: dict[tuple[int, int], Table] = field(default_factory=dict)

    def is_allowed(self, item: Decision, limit: Quality) -> bool:
        """Whether the decision is within the quality limit; settings that the user fixed always are."""
        return QUALITIES.index(item.quality_without(self.fixed.execution)) <= QUALITIES.index(limit)

    def best(self, row: CandidateRow, vram_bytes: int | None = None) -> Decision:
        """Return the best candidate of the row, within `vram_bytes` in place of the budget's VRAM if given."""
        budget = self.budgets.of(row.weights)
        if vram_bytes is not None:
            budget = replace(budget, vram_bytes=vram_bytes)
        pricer = self._pricer(row)
        best = (self._best_of(pool, pricer, row.decode, budget) for pool in row.pools)
        judged = [_judge(row, placement, pricer(placement, row.decode), budget) for placement in best]
        least = min(item.deficit_bytes for item in judged)
        return first_decision([item for item in judged if item.deficit_bytes == least], self.prefer)

    def filled(self, item: Decision, vram_bytes: int | None) -> Decision:
        """Return the decision with as many blocks of streamed components kept as fit into this much device memory."""
        if self.prefer == "memory":
            return item
        pricer, most = self._pricer(item), inf if vram_bytes is None else vram_bytes

        def fits(placement: Mapping[str, Placement]) -> bool:
            price = pricer(placement, item.decode)
            return price.vram_reserved_bytes <= most and price.ram_bytes <= item.demand.ram_bytes

        def seconds(placement: Mapping[str, Placement]) -> float:
            return pricer(placement, item.decode).seconds_per_call

        placement = with_more_kept(item.placement, pricer.spec, self.fixed, fits, seconds)
        return replace(item, placement=placement, demand=pricer(placement, item.decode))

    def _pricer(self, item: CandidateRow | Decision) -> Pricer:
        form = item.weights, item.execution
        return next(pricer for other, pricer in self.pricers if (other.weights, other.execution) == form)

    def seconds_of_fastest(self, among: Iterable[CandidateRow], limit: Quality) -> float:
        """Return the seconds per call of the fastest allowed candidate that fits by its price."""
        best = map(replace(self, prefer="speed").best, among)
        able = (item for item in best if not item.deficit_bytes and self.is_allowed(item, limit))
        return min((item.demand.seconds_per_call for item in able), default=inf)

    def _best_of(
        self, pool: CandidatePool, pricer: Pricer, decode: tuple[Decode, ...], budget: Budget
    ) -> Mapping[str, Placement]:
        """Return the best placement of a pool: its only one, or the best of a table that is built once."""
        if all(len(axis) == 1 for axis in pool.axes):
            return pool.merge(axis[0] for axis in pool.axes)
        key = id(pool), id(pricer)
        if key not in self.tables:
            self.tables[key] = Table(pool, pricer, decode)
        best = self.tables[key].best(decode, budget, self.prefer)
        if self.prefer == "memory":
            return best

        def solve(pool: CandidatePool) -> Mapping[str, Placement]:
            return Table(pool, pricer, decode).best(decode, budget, self.prefer)

        return with_finer_numbers(best, pricer.spec, self.fixed, budget.ram_bytes, solve)


class _Search:
    """The search for the best decision that fits and is confirmed.

    A decision that fails is replaced by the next best of its row within less VRAM, by as much as it was short; so are
    all that decode alike, and those priced as high or higher are rejected with it. Once one is confirmed, faster
    candidates that were skipped are tried. If none is, every row is retried from just below the price that failed,
    because fragmentation differs between placements.
    """

    def __init__(self, entries: Sequence[Entry], limit: Quality, chooser: _Chooser, confirm: Confirm) -> None:
        self.limit = limit
        self.chooser = chooser
        self.check = confirm
        self.rows = list({id(row): row for row, _ in entries}.values())
        self.waiting = list(entries)
        self.simulated: list[Entry] = []
        self.failed: dict[tuple[Decode, ...], Decision] = {}  # by decode, the failed decision priced lowest
        self.lowered: dict[tuple[Decode, ...], int] = {}  # by decode, the limit that a failure left
        self.retried = False

    def run(self) -> Decision | None:
        """Return the decision found, None if nothing fits."""
        while (entry := self._next()) is not None:
            row, priced = entry
            self.waiting.remove(entry)
            if priced.demand.basis in ("assumed", "derived"):
                priced = self._filled(priced)
                self.simulated.append((row, priced))
                return priced
            found = self.confirm(priced)
            self.simulated.append((row, found))
            if found.verdict != "rejected":
                return self._improve(row, priced, found)
            if found.deficit_bytes:  # without a deficit it cannot run at all, which rules out no other candidate
                self._exclude(row, priced, found)
        return None

    def confirm(self, priced: Decision) -> Decision:
        """Check a decision, with as many blocks kept as fit."""
        return self.check(self._filled(priced))

    def _filled(self, priced: Decision) -> Decision:
        """Fill what is left of the budget; once a decision with that decode has failed, of what it was lowered to."""
        most = self.chooser.budgets.of(priced.weights).vram_bytes
        if priced.decode in self.failed:
            most = max(_vram(priced), self.lowered.get(priced.decode, 0))
        return self.chooser.filled(priced, most)

    def _next(self) -> Entry | None:
        """Return the best waiting entry that fits and is allowed; if there is none, retry once."""
        able = [e for e in self.waiting if e[1].verdict == "fits" and self.chooser.is_allowed(e[1], self.limit)]
        if not able and self.failed and not self.retried:
            self._retry()
            return self._next()
        chosen = first_decision([item for _, item in able], self.chooser.prefer) if able else None
        return next((entry for entry in able if entry[1] is chosen), None)

    def _retry(self) -> None:
        """Queue every row again, from just below the lowest price that failed with its decode."""
        self.retried = True
        rows = [row for row in self.rows if row.decode in self.failed]
        again = [(row, self.chooser.best(row, _vram(self.failed[row.decode]) - 1)) for row in rows]
        again = [entry for entry in again if not entry[1].deficit_bytes]
        self.waiting = [entry for entry in self.waiting if all(entry[0] is not row for row, _ in again)] + again

    def _exclude(self, row: CandidateRow, priced: Decision, found: Decision) -> None:
        """Lower the limit of all entries that decode as the failed one does, and queue the next best of its row. When
        rows are tried again, prices that are no segment of the allocator apart rule out nothing."""
        self.failed[row.decode] = priced
        step = max(found.deficit_bytes, int(_vram(priced) * _STEP_SHARE))
        limit = _vram(priced) + (_STEP_BYTES if self.retried else -step)
        self.lowered[row.decode] = 0 if self.retried else limit
        self.waiting = [
            self._lowered(entry, limit, found) if entry[0].decode == row.decode else entry for entry in self.waiting
        ]
        smaller = self.chooser.best(row, _vram(priced) - step)
        self.waiting += [(row, smaller)] if not smaller.deficit_bytes else []

    def _lowered(self, entry: Entry, limit: int, failed: Decision) -> Entry:
        """Return the entry if it is within the limit, else the best of its row that is, else the entry rejected."""
        row, item = entry
        if item.deficit_bytes or _vram(item) <= limit:
            return entry
        smaller = self.chooser.best(row, limit)
        if not smaller.deficit_bytes:
            return row, smaller
        reason = (
            f"projected at {format_bytes(_vram(item))} of VRAM, and one that was projected at"
            f" {format_bytes(_vram(failed))} was short by {format_bytes(failed.deficit_bytes)} when it was simulated"
        )
        short = failed.deficit_bytes + max(0, _vram(item) - _vram(failed))
        return row, replace(item, verdict="rejected", reason=reason, deficit_bytes=short)

    def _improve(self, row: CandidateRow, priced: Decision, found: Decision) -> Decision:
        """Return a faster decision if one of those skipped is confirmed, else the one found."""
        found = self._one_step_up(row, priced, found)
        for other in self.rows:
            if other.decode in self.failed:
                found = self._bisect(other, self.failed[other.decode], found)
        return found

    def _one_step_up(self, row: CandidateRow, priced: Decision, found: Decision) -> Decision:
        """Try a faster candidate of the row, if the simulation needed less than the price."""
        spare, limit, failed = _vram(priced) - _vram(found), self._limit(row), self.failed.get(row.decode)
        if spare <= 0 or limit is None:
            return found
        higher = self.chooser.best(row, limit + spare)
        if not _worth_trying(higher, found) or (failed is not None and _vram(higher) >= _vram(failed)):
            return found
        tried = self.check(self.chooser.filled(higher, _vram(higher)))
        return found if tried.verdict == "rejected" else tried

    def _limit(self, row: CandidateRow) -> int | None:
        return self.chooser.budgets.of(row.weights).vram_bytes

    def _bisect(self, row: CandidateRow, failed: Decision, found: Decision) -> Decision:
        """Bisect the row for a candidate priced below the failed one that is faster than the one found."""
        low, high = 0, _vram(failed)
        while True:
            top = self.chooser.best(row, high - 1)
            if not _worth_trying(top, found) or _vram(top) <= low or not self.chooser.is_allowed(top, self.limit):
                return found
            half = (low + _vram(top)) // 2
            middle = self.chooser.best(row, half)
            if not _worth_trying(middle, found):
                if _vram(top) - low > _STEP_BYTES:
                    low = half
                    continue
                middle = top
            tried = self.check(self.chooser.filled(middle, _vram(middle)))
            if tried.verdict == "rejected":
                high = _vram(middle)
            else:
                found, low = tried, _vram(middle)


def _vram(item: Decision) -> int:
    return item.demand.vram_reserved_bytes


def _worth_trying(other: Decision, found: Decision) -> bool:
    one, two = other.demand, found.demand
    faster = one.seconds_per_call <= two.seconds_per_call * _WORTH_TRYING
    return not other.deficit_bytes and faster and surely_faster(one.seconds_if_slower, two.seconds_if_slower)


def _judge(row: CandidateRow, placement: Mapping[str, Placement], demand: Demand, budget: Budget) -> Decision:
    short = shortage(demand, budget) or (0, "")
    return Decision(
        placement=placement,
        decode=row.decode,
        weights=row.weights,
        execution=row.execution,
        demand=demand,
        verdict="rejected" if short[0] else "fits",
        deficit_bytes=short[0],
        reason=short[1],
    )


def _explain_other(item: Decision, chosen: Decision, limit: Quality, chooser: _Chooser) -> Decision:
    """Return a candidate that was not chosen, with the reason."""
    if item.verdict == "rejected":
        return item
    if not chooser.is_allowed(item, limit):
        gain = chosen.demand.seconds_per_call / max(item.demand.seconds_per_call, 1e-9)
        buys = f", {gain:.1f}x as fast" if gain > 1.05 else ""
        reason = f'fits{buys}, but is only {item.quality.replace("_", " ")}: `allow="{item.quality}"`'
        return _with_verdict(item, "rejected", reason)
    if chooser.prefer == "memory":
        more = max(0, _vram(item) - _vram(chosen))
        return _with_verdict(item, "fits", f"{format_bytes(more)} more memory than the chosen one")
    slower = item.demand.seconds_per_call / max(chosen.demand.seconds_per_call, 1e-9)
    unsure = "" if rounded(slower, 3) >= 1 else ", which is simpler: no sure gain"
    return _with_verdict(item, "fits", f"{slower:.2f}x the time of the chosen one{unsure}")


def _explain_fastest(
    chosen: Decision, others: Sequence[Decision], unlocking: Callable[[Decision], list[str]]
) -> Decision:
    """Return the chosen decision with its reason: why the nearest faster one fails, and what would change that."""
    seconds = chosen.demand.seconds_per_call
    rejected = [item for item in others if item.verdict == "rejected" and item.demand.seconds_per_call < seconds]
    faster = [item for item in rejected if item.demand.seconds_per_call < seconds * 0.95]
    simpler = any(
        item.verdict == "fits" and rounded(item.demand.seconds_per_call / max(seconds, 1e-9), 3) < 1 for item in others
    )
    if not faster:
        first = "the fastest that fits; none is 5% faster" if rejected else "the fastest of all candidates, and it fits"
        first = "the simplest that fits; none is surely faster" if simpler else first
        return _with_verdict(chosen, "chosen", first)
    nearest = sorted(faster, key=lambda item: item.deficit_bytes)
    first = "the simplest that fits, of which none is surely faster" if simpler else "the fastest that fits"
    reason = f"{first}; a faster one: {nearest[0].reason}"
    short = next((item for item in nearest if item.deficit_bytes), None)
    if short is not None:
        ways = " or ".join(unlocking(short))
        reason += f"; {seconds / max(short.demand.seconds_per_call, 1e-9):.1f}x as fast with {ways}" if ways else ""
    return _with_verdict(chosen, "chosen", reason)


def _explain_smallest(chosen: Decision, fastest: float) -> Decision:
    """Return the decision chosen for memory, with its slowdown against the fastest that fits, in seconds per call."""
    slower = chosen.demand.seconds_per_call / max(fastest, 1e-9)
    time = "none that fits is faster"
    if rounded(slower, 3) > 1:
        more = max(1, round((slower - 1) * 100))
        time = f"{more}% slower than the fastest that fits ({format_seconds(fastest)} a call)"
    return _with_verdict(chosen, "chosen", f"takes the least memory of all that fit; {time}")


def _with_verdict(item: Decision, verdict: Verdict, reason: str) -> Decision:
    return replace(item, verdict=verdict, reason=reason)


def _nothing_fits(decisions: Sequence[Decision], allow: Quality | None) -> str:
    nearest = min(decisions, key=lambda item: item.deficit_bytes)
    if nearest.verdict == "rejected":
        return f"nothing fits; the nearest candidate: {nearest.reason}"
    return f'nothing {(allow or "lossless").replace("_", " ")} fits; `allow="{nearest.quality}"` would'
