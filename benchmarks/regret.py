"""What the planner's choice gives away: against all of its candidates, stock diffusers calls, and other tools' rules.

    python benchmarks/regret.py [PIPELINE ...] [--all] [--confirm NAME ...] [--named] [-o FILE.json] [--parts FOLDER]

For each bundled pipeline, budgets of VRAM and RAM, and both levels of quality: no candidate of any table
(`planner.table`) may be faster than what `decide` chooses, nor may the best stock call that fits. The rules of other
tools (`regret_peers.py`) are priced alike. With `--confirm` the choices are also run on a simulated device of that
capacity; with `--named` a few well-known requests are told before and after weight streaming (`regret_named.py`).
Writes every case as JSON and a summary as Markdown beside it; ends with 1 where the choice is not the best. With
`--parts` what is done is kept there by pipeline, and read again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import click
import numpy as np
from regret_candidates import APART, Candidate, Decodes, Lines, Subject, is_faster, subject_of, times_of
from regret_memory import idle, locked, rounded
from regret_peers import PEERS, TOLD, Asked, Choice
from regret_summary import Cases, Grid, summary

from vramplan.errors import NothingFitsError, VramplanError
from vramplan.hardware.types import Budget
from vramplan.planner.decide import Confirm, decide
from vramplan.planner.decision import Decision
from vramplan.planner.fixed import Fixed
from vramplan.profiles.catalogue import device_accelerator, load_device_profile, pipeline_names
from vramplan.simulator.cost_model import apply_simulation
from vramplan.simulator.types import Simulation, SimulationError
from vramplan.strategies import Placement
from vramplan.strategies.base import QUALITIES, Quality
from vramplan.strategies.settings import format_setting, grouped
from vramplan.units import GIB

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
VRAM_GIB = (6, 8, 12, 16, 24, 48)
RAM_GIB = (16, 32, 64)
ALLOWED: tuple[Quality | None, ...] = (None, "near_lossless")
CONFIRMED_RAM_GIB = 64
CONFIRMED_VRAM_GIB = (6, 12, 24)
GRID = Grid(card=CARD, vram_gib=VRAM_GIB, ram_gib=RAM_GIB, confirmed_ram_gib=CONFIRMED_RAM_GIB)
# A tool that is told how much VRAM to use is told so much less until its choice fits.
LOWERED_BYTES = GIB // 4


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


def judged(case: Case) -> dict[str, Any]:
    """The case as it is written."""
    chosen, reason, took = case.choose()
    every = case.subject.able(case.budget, case.allow)[:, 3:]
    best = float(every[:, 0].min()) if len(every) else None
    ours = times_of(chosen, case.subject.price) if chosen else None
    found: dict[str, Any] = {
        "pipeline": case.subject.name,
        "vram_gib": case.vram_gib,
        "ram_gib": case.ram_gib,
        "allow": case.allow,
        "planning_seconds": round(took, 4),
        "chosen": told(chosen) if chosen else None,
        "nothing_fits": reason or None,
        "best_seconds": rounded(best) if best else None,
        "failures": _failures(ours, every),
    }
    quality = chosen.decision.quality if chosen else case.allow or "near_lossless"
    stock = fastest_stock(case, quality)
    found["stock"] = {"call": stock[0], "seconds": rounded(stock[1])} if stock else None
    found["stock_short"] = [call for call, item in case.subject.stock.items() if item.short_bytes(case.budget)]
    if stock and (ours is None or is_faster(times_of(case.subject.stock[stock[0]], case.subject.price), ours)):
        found["failures"].append("a stock call is faster")
    found["peers"] = {name: _peer(case, name, ours) for name in PEERS}
    found |= {**idle(case.subject, case.vram_gib, chosen), **locked(case.subject, chosen)} if chosen else {}
    return found


def _failures(ours: Sequence[float] | None, every: Lines) -> list[str]:
    """Any candidate that is surely faster than the choice: the planner takes the simplest of all others."""
    if ours is None or not len(every):
        return [] if ours is None and not len(every) else ["chosen and best do not agree on whether anything fits"]
    faster = (every[:, 0] * APART < ours[0]) & (every[:, 1:] < np.array(ours[1:])).all(axis=1)
    return ["not the fastest"] if faster.any() else []


def fastest_stock(case: Case, quality: Quality) -> tuple[str, float] | None:
    """The fastest stock call that fits and is at least as faithful."""
    able = [
        (item.demand.seconds_per_call, call)
        for call, item in case.subject.stock.items()
        if not item.short_bytes(case.budget) and QUALITIES.index(item.decision.quality) <= QUALITIES.index(quality)
    ]
    return min(able)[::-1] if able else None


def peer_choices(case: Case, name: str) -> Iterator[Choice]:
    """What a tool chooses: within the budget, and within less of it where a user can tell the tool so."""
    subject, least = case.subject, int(case.budget.vram_bytes or 0) // 2
    for vram in range(int(case.budget.vram_bytes or 0), least, -LOWERED_BYTES):
        choice = PEERS[name](
            Asked(
                spec=subject.spec,
                work=subject.work,
                budget=replace(case.budget, vram_bytes=vram),
                accelerator=subject.accelerator,
                footprint=subject.footprint,
            )
        )
        yield from () if choice is None else (choice,)
        if name not in TOLD:
            return


def _peer(case: Case, name: str, ours: Sequence[float] | None) -> dict[str, Any]:
    """The price of a tool's choice: decoded plainly, or in tiles by a user who knows, where only that fits."""
    subject, short = case.subject, inf
    for choice in peer_choices(case, name):
        for decode in dict.fromkeys((subject.plain, subject.tiled)):
            item = Candidate(placement=choice.priced, decode=decode, demand=subject.price(choice.priced, decode))
            if not item.short_bytes(case.budget):
                return {
                    "seconds": rounded(item.demand.seconds_per_call),
                    "step": rounded(item.demand.seconds_per_step),
                    "vram_gib": rounded(item.demand.vram_reserved_bytes / GIB),
                    "tiled": decode != subject.plain,
                    "surely_faster": ours is not None and is_faster(times_of(item, subject.price), ours),
                }
            short = min(short, item.short_bytes(case.budget))
    return {"refuses": True} if short == inf else {"short_gib": rounded(short / GIB)}


def told(candidate: Candidate) -> dict[str, Any]:
    demand = candidate.demand
    return {
        "placement": {name: format_setting(setting) for name, setting in candidate.placement.items()},
        "decode": [format_setting(setting) for setting in candidate.decode],
        "seconds": rounded(demand.seconds_per_call),
        "step": rounded(demand.seconds_per_step),
        "vram_gib": rounded(demand.vram_reserved_bytes / GIB),
        "ram_gib": rounded(demand.ram_bytes / GIB),
        "quality": candidate.decision.quality,
    }


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
        "planning_seconds": rounded(took),
        "stock_runs": not _stopped(case.subject, called.placement, called.decode, capacity) if called else None,
        "peers": {name: _peer_runs(case, name, capacity) for name in PEERS},
    }


def _peer_runs(case: Case, name: str, capacity: int) -> str:
    """`plain` or `tiled` where the choice runs so, else what stopped it."""
    stopped = "refuses"
    for choice in peer_choices(case, name):
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


# ---- all of it


def cases_of(subject: Subject) -> Iterator[dict[str, Any]]:
    for ram in RAM_GIB:
        for vram in VRAM_GIB:
            for allow in ALLOWED:
                yield judged(Case(subject=subject, vram_gib=vram, ram_gib=ram, allow=allow))
        subject.streamed.clear()


def part_of(name: str) -> dict[str, Any]:
    """All cases of one pipeline, or why there are none."""
    try:
        subject = subject_of(name, device_accelerator(load_device_profile(CARD)))
    except (SimulationError, VramplanError) as error:
        return {"name": name, "left_out": " ".join(str(error).split())}
    return {"name": name, "cases": list(cases_of(subject)), "speed": subject.speed[0] / subject.speed[1]}


def simulated_part(name: str) -> list[tuple[int, dict[str, Any]]]:
    """What ran within each capacity of those that are confirmed."""
    subject = subject_of(name, device_accelerator(load_device_profile(CARD)))
    cases = [Case(subject=subject, vram_gib=vram, ram_gib=CONFIRMED_RAM_GIB, allow=None) for vram in CONFIRMED_VRAM_GIB]
    return [(vram, simulated(case)) for vram, case in zip(CONFIRMED_VRAM_GIB, cases, strict=True)]


def merge(cases: Cases, name: str, found: Sequence[tuple[int, dict[str, Any]]]) -> None:
    """Put what was simulated to the cases of the pipeline."""
    by_vram = dict(found)
    for case in cases:
        same = (case["pipeline"], case["ram_gib"], case["allow"]) == (name, CONFIRMED_RAM_GIB, None)
        if same and case["vram_gib"] in by_vram:
            case["simulated"] = by_vram[case["vram_gib"]]


def written(cases: Cases) -> str:
    """One case to a line."""
    return "[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]\n"


def kept(folder: Path | None, name: str, make: Callable[[], Any]) -> Any:
    """What was made before, else made now and kept in the folder, if there is one."""
    path = folder / f"{name}.json" if folder else None
    if path is not None and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    click.echo(name, err=True)
    found = make()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    return found


@click.command()
@click.argument("pipelines", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every bundled pipeline.")
@click.option("--confirm", multiple=True, help="Run the choices for this pipeline on the simulated device too.")
@click.option("--named", is_flag=True, help="Tell well-known requests before and after weight streaming too.")
@click.option("--parts", type=click.Path(file_okay=False, path_type=Path), help="Keep what is done here, and go on.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path))
def main(
    pipelines: tuple[str, ...],
    everything: bool,
    confirm: tuple[str, ...],
    named: bool,
    parts: Path | None,
    output: Path | None,
) -> None:
    names = pipelines or (pipeline_names() if everything else PIPELINES)
    found = [kept(parts, name, partial(part_of, name)) for name in names]
    table = kept(parts, "named", _named) if named else []
    cases = [case for part in found for case in part.get("cases", ())]
    for name in confirm:
        merge(cases, name, kept(parts, f"{name}-simulated", partial(simulated_part, name)))
    speeds = {part["name"]: part["speed"] for part in found if "speed" in part}
    left_out = {part["name"]: part["left_out"] for part in found if "left_out" in part}
    text = summary(cases, speeds, left_out, table, GRID)
    click.echo(text)
    if output:
        output.write_text(written(cases), encoding="utf-8")
        output.with_suffix(".md").write_text(text, encoding="utf-8")
    sys.exit(any(case["failures"] for case in cases))


def _named() -> list[str]:
    from regret_named import named_table

    return named_table()


if __name__ == "__main__":
    main()
