"""Well-known requests before weight streaming and with it, by price: one table of `regret.py`.

Before is the fastest of all other candidates: diffusers' own levers, and encoding first. Both are within the budget
that a plan has on that card, and neither is simulated within it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vramplan.api.machine import choose_machine, known_budget
from vramplan.errors import NothingFitsError
from vramplan.hardware.types import Budget
from vramplan.pipeline.describe import describe
from vramplan.planner.candidates import CandidateRow, rows
from vramplan.planner.decide import decide
from vramplan.planner.decision import worst_quality
from vramplan.planner.demand import Demand, Pricer
from vramplan.planner.fixed import Fixed
from vramplan.planner.table import Table
from vramplan.simulator.model import SimulatedModel, simulated_footprint
from vramplan.strategies import Decode, Placement
from vramplan.strategies.base import QUALITIES
from vramplan.strategies.settings import format_setting
from vramplan.strategies.weight_streaming import WeightStreaming
from vramplan.units import GIB
from vramplan.workload import make_workload

# Pipeline, card, VRAM in place of the card's own, RAM.
NAMED = (
    ("flux.1-dev", "rtx-4070", None, "64GiB"),
    ("flux.1-dev", "rtx-3060-laptop", None, "16GiB"),
    ("qwen-image", "rtx-4070", None, "32GiB"),
    ("stable-diffusion-xl", "rtx-4070", "4GiB", "32GiB"),
    ("wan2.2-ti2v-5b", "rtx-4070", None, "32GiB"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """A placement with its price."""

    placement: Mapping[str, Placement]
    decode: tuple[Decode, ...]
    demand: Demand
    pricer: Pricer

    @property
    def file_gib(self) -> float:
        """GiB read from files in a call: the model's own, or those of disk offload."""
        total = 0.0
        for name, setting in self.placement.items():
            hold = setting.hold(self.pricer.spec.component(name), self.pricer.spec)
            uses = [use for use in self.pricer.spec.uses if use.component == name]
            works = [(use, self.pricer.footprint.work(use, self.decode).forwards) for use in uses]
            forwards = sum(each * (self.pricer.evaluations if use.in_loop else 1) for use, each in works)
            streamed = (forwards * hold.gathered_bytes + hold.entry_gathered_bytes) if hold.from_file else 0
            total += forwards * hold.disk_bytes + hold.read_bytes + streamed
        return total / GIB


def named_table() -> list[str]:
    """The table's lines."""
    lines = [
        "A card's budget is what a plan has of it, with 80 % of its PCIe link. Before: the fastest candidate without "
        "weight streaming, encoding first included. `partial_residency`, which weight streaming replaced, took 2.0 s a "
        "step in the first of these, 17.6 in the second, and 19.8 in the third.",
        "",
        "| request | | seconds a call | a step | read from files, GiB a call | page-locked GiB | VRAM idle while"
        " denoising, of GiB | plan |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for name, card, vram, ram in NAMED:
        lines += _rows_of(name, card, vram, ram)
    return lines


def _rows_of(name: str, card: str, vram: str | None, ram: str) -> list[str]:
    described = describe(name)
    hardware, accelerator = choose_machine(card)
    spec, work = described.spec, make_workload(described.defaults, {})
    budget = known_budget(hardware, accelerator, {"vram": vram, "ram": ram}, pipeline=spec.class_name)
    assert accelerator is not None
    footprint = simulated_footprint(SimulatedModel(spec), work, accelerator)
    pricer = Pricer(spec, work, footprint, accelerator)
    before = _without_streaming(rows(spec, work, Fixed(), accelerator)[0], pricer, budget)
    try:
        chosen = decide(spec, work, budget, accelerator=accelerator, footprint=footprint, fixed=Fixed()).chosen
        now = Priced(placement=chosen.placement, decode=chosen.decode, demand=chosen.demand, pricer=pricer)
    except NothingFitsError:
        now = None
    what = f"{name} on {card}{f' with {vram}' if vram else ''}, {ram} of RAM"
    return [_line(what, "before", before, budget), _line("", "now", now, budget)]


def _without_streaming(found: list[CandidateRow], pricer: Pricer, budget: Budget) -> Priced | None:
    """The fastest that fits, at the first level of quality that has one."""
    priced = []
    for row in found:
        for pool in row.pools:
            settings = (setting for axis in pool.axes for placed in axis for setting in placed.values())
            if any(isinstance(setting, WeightStreaming) for setting in settings):
                continue
            several = any(len(axis) > 1 for axis in pool.axes)
            best = Table(pool, pricer, row.decode).best(row.decode, budget, "speed") if several else None
            placement = best or next(iter(pool.placements))
            demand = pricer(placement, row.decode)
            if demand.vram_reserved_bytes <= (budget.vram_bytes or 0) and demand.ram_bytes <= budget.ram_bytes:
                priced.append(Priced(placement=placement, decode=row.decode, demand=demand, pricer=pricer))
    for level in QUALITIES:
        able = [item for item in priced if worst_quality(item.decode) == level]
        if able:
            return min(able, key=lambda item: item.demand.seconds_per_call)
    return None


def _line(what: str, when: str, item: Priced | None, budget: Budget) -> str:
    if item is None:
        return f"| {what} | {when} | nothing fits | | | | | |"
    demand, vram = item.demand, (budget.vram_bytes or 0) / GIB
    idle = vram - next(phase.reserved_bytes for phase in demand.phases if phase.name == "denoise") / GIB
    grouped: dict[str, list[str]] = {}
    for name, setting in item.placement.items():
        grouped.setdefault(format_setting(setting), []).append(name)
    plan = "; ".join([f"{', '.join(names)}: {text}" for text, names in grouped.items()])
    decode = ", ".join(map(format_setting, item.decode))
    cells = [
        what,
        when,
        f"{demand.seconds_per_call:.1f}",
        f"{demand.seconds_per_step:.2f}",
        f"{item.file_gib:.1f}",
        f"{demand.pinned_bytes / GIB:.1f}",
        f"{idle:.2f} of {vram:.2f}",
        plan + (f"; decode: {decode}" if decode else ""),
    ]
    return f"| {' | '.join(cells)} |"
