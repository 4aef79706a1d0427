"""What the planner's choice gives away: against all of its candidates, stock diffusers calls, and other tools' rules.

    python benchmarks/regret.py [PIPELINE ...] [--all] [--confirm NAME ...] [-o FILE.json]

For each bundled pipeline, budgets of VRAM and RAM, and both levels of quality: what `decide` chooses must be the best
of every candidate priced one by one, and never slower than the best stock call that fits. The rules of other tools
(`regret_peers.py`) are priced alike. With `--confirm` the choices are also run on a simulated device of that capacity.
Writes every case as JSON and a summary as Markdown beside it; ends with 1 where the choice is not the best.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from regret_peers import PEERS, Asked, Choice

from vramplan.errors import NothingFitsError, VramplanError
from vramplan.hardware.types import Accelerator, Budget
from vramplan.pipeline.describe import describe
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.planner.candidates import ComponentPlacements, rows
from vramplan.planner.decide import Confirm, decide
from vramplan.planner.decision import Decision, rank
from vramplan.planner.demand import Demand, Pricer
from vramplan.planner.fixed import Fixed
from vramplan.profiles.catalogue import device_accelerator, load_device_profile, pipeline_names
from vramplan.simulator.cost_model import apply_simulation
from vramplan.simulator.footprint import SimulatedFootprint
from vramplan.simulator.model import SimulatedModel, simulated_footprint
from vramplan.simulator.run import SimulationError
from vramplan.simulator.types import Simulation
from vramplan.strategies import Decode, Placement
from vramplan.strategies.base import QUALITIES, Quality
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.model_cpu_offload import ModelCpuOffload
from vramplan.strategies.resident import Resident
from vramplan.strategies.sequential_cpu_offload import SequentialCpuOffload
from vramplan.strategies.settings import format_setting, grouped
from vramplan.strategies.vae_tiling import VaeTiling
from vramplan.units import GIB
from vramplan.workload import Workload, make_workload

PIPELINES = (
    "stable-diffusion-1.5",
    "stable-diffusion-xl",
    "stable-diffusion-3-medium",
    "pixart-sigma",
    "flux.1-dev",
    "cogvideox-2b",
    "cogvideox-5b",
    "wan2.1-t2v-1.3b",
    "hunyuanvideo",
)
CARD = "rtx-4090"
VRAM_GIB = (6, 8, 10, 12, 16, 24, 32, 48, 80)
RAM_GIB = (16, 32, 64, 128)
ALLOWED: tuple[Quality | None, ...] = (None, "near_lossless")
CONFIRMED_RAM_GIB = 64
# Idle VRAM that is forgiven while something is offloaded: this much, or this share of the budget.
IDLE_GIB, IDLE_SHARE = 0.5, 0.05
Decodes = tuple[Decode, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One placement and decode, priced."""

    placement: Mapping[str, Any]
    decode: Decodes
    demand: Demand

    @property
    def decision(self) -> Decision:
        """As the planner has it, to be ranked as the planner does."""
        told: dict[str, Any] = {"verdict": "fits", "reason": "", "deficit_bytes": 0}
        return Decision(placement=self.placement, decode=self.decode, demand=self.demand, **told)

    def short_bytes(self, budget: Budget) -> int:
        """By how much it does not fit, VRAM and RAM together."""
        vram = max(0, self.demand.vram_reserved_bytes - (budget.vram_bytes or 0))
        return vram + max(0, self.demand.ram_bytes - budget.ram_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A pipeline with every candidate priced."""

    name: str
    spec: PipelineSpec
    work: Workload
    accelerator: Accelerator
    source: SimulatedModel
    footprint: SimulatedFootprint
    price: Pricer
    plain: Decodes
    tiled: Decodes
    # A line each, priced one by one: VRAM and RAM in bytes, quality, and the rank.
    candidates: npt.NDArray[np.float64]
    stock: Mapping[str, Candidate]
    priced_per_second: float


# ---- everything that can be chosen, priced


def subject_of(name: str, accelerator: Accelerator) -> Subject:
    described = describe(name)
    spec, work = described.spec, make_workload(described.defaults, {})
    source = SimulatedModel(spec)
    footprint = simulated_footprint(source, work, accelerator)
    price = Pricer(spec, work, footprint, accelerator)
    found, _ = rows(spec, work, Fixed(), accelerator)
    decodes = list(dict.fromkeys(row.decode for row in found))
    for decode in decodes:  # simulates each, which is not what is timed below
        price(found[0].placements[0], decode)
    began = time.perf_counter()
    lines = [_line_of(placed, row.decode, price(placed, row.decode)) for row in found for placed in row.placements]
    took = time.perf_counter() - began
    tiled = max(decodes, key=_tile)
    return Subject(
        name=name,
        spec=spec,
        work=work,
        accelerator=accelerator,
        source=source,
        footprint=footprint,
        price=price,
        plain=() if () in decodes else tiled,
        tiled=tiled,
        candidates=np.array(lines),
        stock=stock_calls(spec, accelerator, price, () if () in decodes else tiled, tiled),
        priced_per_second=len(lines) / took,
    )


def _line_of(placed: ComponentPlacements, decode: Decodes, demand: Demand) -> tuple[float, ...]:
    candidate = Candidate(placement=placed, decode=decode, demand=demand)
    quality = QUALITIES.index(candidate.decision.quality)
    return demand.vram_reserved_bytes, demand.ram_bytes, quality, *rank(candidate.decision, "speed")


def _tile(decode: Decodes) -> int:
    """The size of its tiles, -1 for a decode without: the largest is the VAE's own."""
    return max((setting.tile for setting in decode if isinstance(setting, VaeTiling)), default=-1)


def stock_calls(
    spec: PipelineSpec, accelerator: Accelerator, price: Pricer, plain: Decodes, tiled: Decodes
) -> dict[str, Candidate]:
    """What a user would call by hand, as far as diffusers takes it, each decoded plainly and in tiles."""
    found: dict[str, Candidate] = {}
    for label, placed in _stock_placements(spec, accelerator):
        for decode, how in ((plain, ""), (tiled, " + tiling")):
            if decode != plain or not how:
                demand = price(placed, decode)
                found[label + how] = Candidate(placement=placed, decode=decode, demand=demand)
    return found


def _stock_placements(spec: PipelineSpec, accelerator: Accelerator) -> Iterator[tuple[str, Mapping[str, Placement]]]:
    def taken(component: Component, setting: Placement) -> bool:
        return setting.refusal(component, spec, accelerator) is None

    for whole in (Resident(), ModelCpuOffload(), SequentialCpuOffload()):
        if all(taken(component, whole) for component in spec.components):
            yield whole.name, {component.name: whole for component in spec.components}
    for setting in (
        GroupOffload(type="block"),
        GroupOffload(type="block", stream=True),
        GroupOffload(type="leaf", stream=True),
    ):
        for everything in (False, True):
            placed = {c.name: _grouped_or_resident(c, setting, everything, taken) for c in spec.components}
            if any(isinstance(found, GroupOffload) for found in placed.values()):
                yield f"{format_setting(setting)} of {'all' if everything else 'the denoiser'}", placed


def _grouped_or_resident(
    component: Component, setting: GroupOffload, everything: bool, taken: Callable[[Component, Placement], bool]
) -> Placement:
    """The setting, without a stream where that cannot be, else resident."""
    if component.role not in ("denoiser", "control") and not everything:
        return Resident()
    wanted = (found.complete(component) for found in (setting, replace(setting, stream=False)))
    return next((found for found in wanted if taken(component, found)), Resident())


# ---- one case


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One pipeline within one budget, at one level of quality; None allows the last resort."""

    subject: Subject
    vram_gib: float
    ram_gib: int
    allow: Quality | None

    @property
    def budget(self) -> Budget:
        return Budget(vram_bytes=int(self.vram_gib * GIB), ram_bytes=self.ram_gib * GIB)

    def choose(self, confirm: Confirm | None = None) -> tuple[Candidate | None, str, float]:
        """The chosen candidate or why there is none, and the seconds it took."""
        subject, began = self.subject, time.perf_counter()
        chosen, reason = None, ""
        try:
            found = decide(
                subject.spec,
                subject.work,
                self.budget,
                accelerator=subject.accelerator,
                footprint=subject.footprint,
                fixed=Fixed(),
                allow=self.allow,
                confirm=confirm,
            ).chosen
            chosen = Candidate(placement=found.placement, decode=found.decode, demand=found.demand)
        except NothingFitsError as error:
            reason = str(error)
        return chosen, reason, time.perf_counter() - began

    def best(self) -> tuple[float, ...] | None:
        """The rank of the best of every candidate that fits, at the first level of quality that has one."""
        budget, every = self.budget, self.subject.candidates
        fitting = every[(every[:, 0] <= budget.vram_bytes) & (every[:, 1] <= budget.ram_bytes)]
        for level in (self.allow,) if self.allow else ("lossless", "near_lossless"):
            able = fitting[fitting[:, 2] <= QUALITIES.index(level)]
            if len(able):
                return tuple(min(map(tuple, able[able[:, 3] == able[:, 3].min(), 3:].tolist())))
        return None


def judged(case: Case) -> dict[str, Any]:
    """The case as it is written."""
    chosen, reason, took = case.choose()
    best = case.best()
    found: dict[str, Any] = {
        "pipeline": case.subject.name,
        "vram_gib": case.vram_gib,
        "ram_gib": case.ram_gib,
        "allow": case.allow,
        "planning_seconds": round(took, 4),
        "chosen": told(chosen) if chosen else None,
        "nothing_fits": reason or None,
        "best_seconds": best[0] if best else None,
        "failures": _failures(chosen, best),
    }
    quality = chosen.decision.quality if chosen else case.allow or "near_lossless"
    stock = fastest_stock(case, quality)
    found["stock"] = {"call": stock[0], "seconds": _rounded(stock[1])} if stock else None
    found["stock_short"] = [call for call, item in case.subject.stock.items() if item.short_bytes(case.budget)]
    if stock and (chosen is None or _digits(stock[1]) < _digits(chosen.demand.seconds_per_call)):
        found["failures"].append("a stock call is faster")
    found["peers"] = {name: _peer(case, name) for name in PEERS}
    found |= _idle(case, chosen) if chosen else {}
    return found


def _failures(chosen: Candidate | None, best: tuple[float, ...] | None) -> list[str]:
    if chosen is None or best is None:
        return [] if chosen is None and best is None else ["chosen and best do not agree on whether anything fits"]
    ours = tuple(rank(chosen.decision, "speed"))
    if ours == best:
        return []
    return ["not the fastest" if ours[0] > best[0] else "as fast as the best, but not ranked with it"]


def fastest_stock(case: Case, quality: Quality) -> tuple[str, float] | None:
    """The fastest stock call that fits and is at least as faithful."""
    able = [
        (item.demand.seconds_per_call, call)
        for call, item in case.subject.stock.items()
        if not item.short_bytes(case.budget) and QUALITIES.index(item.decision.quality) <= QUALITIES.index(quality)
    ]
    return min(able)[::-1] if able else None


def peer_choice(case: Case, name: str) -> Choice | None:
    subject = case.subject
    asked = Asked(spec=subject.spec, budget=case.budget, accelerator=subject.accelerator, footprint=subject.footprint)
    return PEERS[name](asked)


def _peer(case: Case, name: str) -> dict[str, Any]:
    """The price of a tool's choice: decoded plainly, or in tiles by a user who knows, where only that fits."""
    choice, subject = peer_choice(case, name), case.subject
    if choice is None:
        return {"refuses": True}
    demands = {decode: subject.price(choice.priced, decode) for decode in (subject.plain, subject.tiled)}
    items = [Candidate(placement=choice.priced, decode=decode, demand=demand) for decode, demand in demands.items()]
    shorts = [item.short_bytes(case.budget) for item in items]
    if all(shorts):
        return {"short_gib": _rounded(min(shorts) / GIB)}
    item = items[shorts.index(0)]
    vram = _rounded(item.demand.vram_reserved_bytes / GIB)
    return {"seconds": _rounded(item.demand.seconds_per_call), "vram_gib": vram, "tiled": bool(shorts[0])}


def _idle(case: Case, chosen: Candidate) -> dict[str, Any]:
    """VRAM left idle while anything is offloaded, and the share of the call's time that room for all of it would save:
    more than any use of what is idle could."""
    offloaded = [name for name, setting in chosen.placement.items() if not isinstance(setting, Resident)]
    idle = case.vram_gib - chosen.demand.vram_reserved_bytes / GIB if offloaded else 0.0
    beyond = idle > max(IDLE_GIB, IDLE_SHARE * case.vram_gib)
    seconds = case.subject.price(dict.fromkeys(chosen.placement, Resident()), chosen.decode).seconds_per_call
    worth = 1 - seconds / chosen.demand.seconds_per_call
    return {"idle_gib": _rounded(idle), "idle_beyond": beyond, "idle_worth": _rounded(worth)}


def told(candidate: Candidate) -> dict[str, Any]:
    demand = candidate.demand
    return {
        "placement": {name: format_setting(setting) for name, setting in candidate.placement.items()},
        "decode": [format_setting(setting) for setting in candidate.decode],
        "seconds": _rounded(demand.seconds_per_call),
        "vram_gib": _rounded(demand.vram_reserved_bytes / GIB),
        "ram_gib": _rounded(demand.ram_bytes / GIB),
        "quality": candidate.decision.quality,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _digits(value: float) -> float:
    """To three digits: what differs by less is equally fast."""
    return float(f"{value:.3g}")


# ---- on the simulated device


def run(subject: Subject, placement: Mapping[str, Placement], decode: Decodes, capacity: int | None) -> Simulation:
    vaes = [component.name for component in subject.spec.vaes]
    decodes = [(setting, vaes) for setting in decode]
    return subject.source.run(
        subject.work, grouped(placement), decodes, accelerator=subject.accelerator, capacity_bytes=capacity
    )


def simulated(case: Case) -> dict[str, Any]:
    """The choice confirmed as `vramplan plan` does it, and each tool's choice run as near as can be."""
    capacity, tries = case.vram_gib * GIB, 0

    def confirm(decision: Decision) -> Decision:
        nonlocal tries
        tries += 1
        try:
            return apply_simulation(decision, run(case.subject, decision.placement, decision.decode, capacity))
        except SimulationError:
            return decision

    chosen, _, took = case.choose(confirm)
    stock = fastest_stock(case, chosen.decision.quality if chosen else "near_lossless")
    called = case.subject.stock[stock[0]] if stock else None
    return {
        "chosen": told(chosen) if chosen else None,
        "tries": tries,
        "planning_seconds": _rounded(took),
        "stock_runs": not _stopped(case.subject, called.placement, called.decode, capacity) if called else None,
        "peers": {name: _peer_runs(case, name, capacity) for name in PEERS},
    }


def _peer_runs(case: Case, name: str, capacity: int) -> str:
    """`plain` or `tiled` where the choice runs so, else what stopped it."""
    choice = peer_choice(case, name)
    if choice is None:
        return "refuses"
    stopped = "does not run"
    for how, decode in (("plain", case.subject.plain), ("tiled", case.subject.tiled)):
        try:
            stopped = _stopped(case.subject, choice.runs_as, decode, capacity)
        except (SimulationError, VramplanError, ValueError) as error:
            return f"cannot be simulated: {' '.join(str(error).split())[:120]}"
        if not stopped:
            return how
    return stopped


def _stopped(subject: Subject, placement: Mapping[str, Placement], decode: Decodes, capacity: int) -> str:
    """What ran out of memory. A run that keeps below the capacity by itself needs no second one within it."""
    free = run(subject, placement, decode, None)
    if free.peak_reserved_bytes <= capacity:
        return ""
    if free.peak_allocated_bytes > capacity:
        return "out of memory"
    return "out of memory" if run(subject, placement, decode, capacity).stopped else ""


# ---- the summary


Cases = Sequence[Mapping[str, Any]]


def ratios(cases: Cases, of: Callable[[Mapping[str, Any]], float | None]) -> list[float]:
    """By how much what `of` gives is slower than the choice, where both are."""
    pairs = ((of(case), case["chosen"]) for case in cases)
    return [seconds / chosen["seconds"] for seconds, chosen in pairs if seconds and chosen]


def mean_and_worst(values: Sequence[float]) -> list[str]:
    """Geometric mean, the least and the largest."""
    if not values:
        return ["-", "-", "-"]
    return [f"{math.exp(statistics.fmean(map(math.log, values))):.2f}", f"{min(values):.2f}", f"{max(values):.2f}"]


def by_pipeline(cases: Cases) -> list[str]:
    lines = [
        "| pipeline | cases | something fits | failures | fastest stock / chosen: mean | least | largest |"
        " only ours fits | idle beyond the target | seconds a decision, median, largest |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in (*dict.fromkeys(case["pipeline"] for case in cases), "all"):
        own = [case for case in cases if name in ("all", case["pipeline"])]
        fits = [case for case in own if case["chosen"]]
        took = [case["planning_seconds"] for case in own]
        cells = [name, len(own), len(fits), sum(bool(case["failures"]) for case in own)]
        cells += mean_and_worst(ratios(own, _stock_seconds))
        cells += [sum(not case["stock"] for case in fits), sum(case["idle_beyond"] for case in fits)]
        cells += [f"{statistics.median(took):.3f}, {max(took):.3f}"]
        lines.append(_line(cells))
    return lines


def _stock_seconds(case: Mapping[str, Any]) -> float | None:
    return case["stock"]["seconds"] if case["stock"] else None


def by_peer(cases: Cases) -> list[str]:
    lines = [
        "| rule | fits plainly | only with tiles set by hand | out of memory or refuses, where ours fits |"
        " its seconds / chosen: mean | least | largest |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    fits = [case for case in cases if case["chosen"]]
    for name in PEERS:
        found = [case["peers"][name] for case in fits]
        able = [item for item in found if "seconds" in item]
        tiled = sum(item["tiled"] for item in able)
        cells = [name, len(able) - tiled, tiled, len(found) - len(able)]
        lines.append(_line([*cells, *mean_and_worst(ratios(fits, _seconds_of(name)))]))
    return lines


def _seconds_of(peer: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda case: case["peers"][peer].get("seconds")


def by_stock_call(cases: Cases) -> list[str]:
    """How often each stock call runs out of memory where the choice fits."""
    fits = [case for case in cases if case["chosen"]]
    short: dict[str, int] = {}
    fastest: dict[str, int] = {}
    for case in fits:
        for call in case["stock_short"]:
            short[call] = short.get(call, 0) + 1
        if case["stock"]:
            fastest[case["stock"]["call"]] = fastest.get(case["stock"]["call"], 0) + 1
    lines = ["| stock call | out of memory where ours fits | the fastest that fits |", "|---|--:|--:|"]
    return lines + [_line([call, short.get(call, 0), fastest.get(call, 0)]) for call in sorted({*short, *fastest})]


def by_run(cases: Cases) -> list[str]:
    """What ran on the simulated device."""
    ran = [case for case in cases if "simulated" in case]
    ours = [case for case in ran if case["simulated"]["chosen"]]
    tries = [case["simulated"]["tries"] for case in ours]
    stock = [case["simulated"]["stock_runs"] for case in ran if case["stock"]]
    worse = [case["simulated"]["chosen"]["seconds"] / case["chosen"]["seconds"] for case in ours if case["chosen"]]
    lines = [
        f"{len(ran)} cases were run within their capacity ({', '.join(dict.fromkeys(c['pipeline'] for c in ran))}, "
        f"{CONFIRMED_RAM_GIB} GiB of RAM). A plan was confirmed in {len(ours)}, after {statistics.fmean(tries):.1f} "
        f"simulations on average and {max(tries)} at most; it takes at most {max(worse):.2f} times as long as the "
        f"unconfirmed one. The fastest stock call ran in {stock.count(True)} of the {len(stock)} that had one.",
        "",
        "| rule | runs plainly | only with tiles set by hand | out of memory, where ours runs | not simulated |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in PEERS:
        found = [case["simulated"]["peers"][name] for case in ours]
        counted = [found.count(kind) for kind in ("plain", "tiled", "out of memory")]
        lines.append(_line([name, *counted, len(found) - sum(counted)]))
    return lines


def listed(cases: Cases, wanted: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """One line for each remark, with the budgets it was made at."""
    found: dict[str, list[str]] = {}
    for case in cases:
        remark = wanted(case)
        if remark:
            allow = "" if case["allow"] is None else f" {case['allow']}"
            found.setdefault(remark, []).append(f"{case['vram_gib']}/{case['ram_gib']}{allow}")
    return [f"* {remark}: {', '.join(places)}" for remark, places in found.items()]


def _failure_remark(case: Mapping[str, Any]) -> str:
    if not case["failures"]:
        return ""
    chosen = f"{case['chosen']['seconds']:g} s" if case["chosen"] else "nothing"
    stock = f", {case['stock']['call']} {case['stock']['seconds']:g} s" if case["stock"] else ""
    best = f"{case['best_seconds']:g} s" if case["best_seconds"] else "nothing"
    return f"{case['pipeline']}: {'; '.join(case['failures'])} (chosen {chosen}, best candidate {best}{stock})"


def _idle_remark(case: Mapping[str, Any]) -> str:
    if not case.get("idle_beyond"):
        return ""
    placed = case["chosen"]["placement"]
    away = ", ".join(f"{name} {setting}" for name, setting in placed.items() if setting != "resident")
    return f"{case['pipeline']}: {case['idle_gib']:g} GiB idle, with {away}; worth at most {case['idle_worth']:.1%}"


def _line(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def summary(cases: Cases, speeds: Mapping[str, float], left_out: Mapping[str, str]) -> str:
    failed = listed(cases, _failure_remark)
    idle = listed(cases, _idle_remark)
    lines = [
        f"{len(cases)} cases: {len(speeds)} pipelines at their default workload on the rates of an {CARD}, with "
        f"{', '.join(map(str, VRAM_GIB))} GiB of VRAM and {', '.join(map(str, RAM_GIB))} GiB of RAM, lossless with the "
        "last resort, and near lossless allowed. All times are the planner's own prices: they rank choices, none was "
        f"measured. {sum(bool(case['failures']) for case in cases)} failures.",
        "",
        *by_pipeline(cases),
        "",
        f"Candidates priced in a second: {min(speeds.values()):.0f} to {max(speeds.values()):.0f} (target 1000).",
        "",
        "## Other tools' rules",
        "",
        "As `regret_peers.py` has them, without quantising. A rule decodes plainly, in tiles only where nothing else "
        "fits: a user sets that by hand, no rule does. A ratio below 1 is a choice that is faster by the price: with "
        "components that come back from pinned memory or leave by need, which no diffusers pipeline does by itself.",
        "",
        *by_peer(cases),
        "",
        *(["## On the simulated device", "", *by_run(cases), ""] if any("simulated" in case for case in cases) else []),
        "## Stock calls",
        "",
        *by_stock_call(cases),
        "",
        "## Failures",
        "",
        *(failed or ["None."]),
        "",
        f"## VRAM idle beyond max({IDLE_GIB} GiB, {IDLE_SHARE:.0%}) while something is offloaded",
        "",
        *(idle or ["None."]),
    ]
    lines += ["", "## Left out", "", *(f"* {name}: {why}" for name, why in left_out.items())] if left_out else []
    return "\n".join(lines) + "\n"


# ---- all of it


def cases_of(subject: Subject, *, confirm: bool) -> Iterator[dict[str, Any]]:
    for vram in VRAM_GIB:
        for ram in RAM_GIB:
            for allow in ALLOWED:
                case = Case(subject=subject, vram_gib=vram, ram_gib=ram, allow=allow)
                found = judged(case)
                if confirm and ram == CONFIRMED_RAM_GIB and allow is None:
                    found["simulated"] = simulated(case)
                yield found


def written(cases: Cases) -> str:
    """One case to a line."""
    return "[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]\n"


@click.command()
@click.argument("pipelines", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every bundled pipeline.")
@click.option("--confirm", multiple=True, help="Run the choices for this pipeline on the simulated device too.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path))
def main(pipelines: tuple[str, ...], everything: bool, confirm: tuple[str, ...], output: Path | None) -> None:
    accelerator = device_accelerator(load_device_profile(CARD))
    cases: list[dict[str, Any]] = []
    speeds: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name in pipelines or (pipeline_names() if everything else PIPELINES):
        click.echo(name, err=True)
        try:
            subject = subject_of(name, accelerator)
        except (SimulationError, VramplanError) as error:
            left_out[name] = " ".join(str(error).split())
            continue
        speeds[name] = subject.priced_per_second
        cases += cases_of(subject, confirm=name in confirm)
    text = summary(cases, speeds, left_out)
    click.echo(text)
    if output:
        output.write_text(written(cases), encoding="utf-8")
        output.with_suffix(".md").write_text(text, encoding="utf-8")
    sys.exit(any(case["failures"] for case in cases))


if __name__ == "__main__":
    main()
