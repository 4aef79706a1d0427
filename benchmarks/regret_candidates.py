"""Everything that `decide` can choose for a pipeline, priced; and what a user would call by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from regret_summary import LEVELS

from vramplan.hardware.types import Accelerator, Budget
from vramplan.pipeline.describe import describe
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.planner.candidates import CandidateRow, rows
from vramplan.planner.decision import Decision, worst_quality
from vramplan.planner.demand import Demand, Pricer
from vramplan.planner.fixed import Fixed
from vramplan.planner.pool import CandidatePool
from vramplan.planner.table import Table
from vramplan.simulator.footprint import SimulatedFootprint
from vramplan.simulator.model import SimulatedModel, simulated_footprint
from vramplan.strategies import Decode, Placement
from vramplan.strategies.base import QUALITIES, Quality
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.model_cpu_offload import ModelCpuOffload
from vramplan.strategies.resident import Resident
from vramplan.strategies.sequential_cpu_offload import SequentialCpuOffload
from vramplan.strategies.settings import format_setting
from vramplan.strategies.vae_tiling import VaeTiling
from vramplan.strategies.weight_streaming import WeightStreaming
from vramplan.workload import Workload, make_workload

# Times this much apart differ in the third digit.
APART = 1.005
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


Lines = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A pipeline whose candidates are priced when they are first asked for: streamed ones for each amount of RAM."""

    name: str
    spec: PipelineSpec
    work: Workload
    accelerator: Accelerator
    source: SimulatedModel
    footprint: SimulatedFootprint
    price: Pricer
    plain: Decodes
    tiled: Decodes
    stock: Mapping[str, Candidate]
    # A line a candidate: VRAM and RAM in bytes, quality, seconds, and seconds with one term after the other slower.
    unstreamed: Lines
    streamed: dict[int, Lines] = field(default_factory=dict)
    # Candidates priced, and the seconds of it.
    speed: list[float] = field(default_factory=lambda: [0, 0.0])

    def able(self, budget: Budget, allow: Quality | None, *, streaming: bool = True) -> Lines:
        """The candidates that fit, at the first level of quality that has any."""
        if streaming and budget.ram_bytes not in self.streamed:
            found, _ = rows(self.spec, self.work, Fixed(), self.accelerator, ram_bytes=budget.ram_bytes)
            self.streamed[budget.ram_bytes] = priced(found, self.price, is_streaming, self.speed)
        every = [self.unstreamed, *([self.streamed[budget.ram_bytes]] if streaming else [])]
        fitting = [each[(each[:, 0] <= budget.vram_bytes) & (each[:, 1] <= budget.ram_bytes)] for each in every]
        for level in (allow,) if allow else LEVELS:
            found = np.concatenate([each[each[:, 2] <= QUALITIES.index(level)] for each in fitting])
            if len(found):
                return found
        return found


def subject_of(name: str, accelerator: Accelerator) -> Subject:
    described = describe(name)
    spec, work = described.spec, make_workload(described.defaults, {})
    source = SimulatedModel(spec)
    footprint = simulated_footprint(source, work, accelerator)
    price = Pricer(spec, work, footprint, accelerator)
    found, _ = rows(spec, work, Fixed(), accelerator)
    decodes = list(dict.fromkeys(row.decode for row in found))
    first = next(iter(found[0].pools[0].placements))
    for decode in decodes:  # simulates each, which is not what is timed below
        price(first, decode)
    tiled = max(decodes, key=_tile)
    plain = () if () in decodes else tiled
    speed = [0, 0.0]
    return Subject(
        name=name,
        spec=spec,
        work=work,
        accelerator=accelerator,
        source=source,
        footprint=footprint,
        price=price,
        plain=plain,
        tiled=tiled,
        stock=stock_calls(spec, accelerator, price, plain, tiled),
        unstreamed=priced(found, price, lambda pool: not is_streaming(pool), speed),
        speed=speed,
    )


def is_streaming(pool: CandidatePool) -> bool:
    return any(isinstance(setting, WeightStreaming) for axis in pool.axes for each in axis for setting in each.values())


def priced(
    found: Sequence[CandidateRow], price: Pricer, wanted: Callable[[CandidatePool], bool], speed: list[float]
) -> Lines:
    """The candidates of the wanted pools, a pool's by one table for all decodes."""
    tables: dict[int, Table] = {}
    lines = [np.empty((0, 4 + len(price.slower)))]
    began = time.perf_counter()
    for row in found:
        for pool in filter(wanted, row.pools):
            if prod(map(len, pool.axes)) == 1:  # its components may depend on each other
                lines.append(np.array([_line_of(pool, row.decode, price)]))
                continue
            table = tables.setdefault(id(pool), Table(pool, price, row.decode))
            vram, seconds = table.vram_and_seconds(row.decode)
            quality = np.maximum(table.quality, QUALITIES.index(worst_quality(row.decode)))
            lines.append(np.stack([vram, table.ram, quality, seconds, *table.if_slower(row.decode)], axis=1))
    every = np.concatenate(lines)
    speed[0] += len(every)
    speed[1] += time.perf_counter() - began
    return every


def _line_of(pool: CandidatePool, decode: Decodes, price: Pricer) -> tuple[float, ...]:
    placed = next(iter(pool.placements))
    candidate = Candidate(placement=placed, decode=decode, demand=price(placed, decode))
    demand, quality = candidate.demand, QUALITIES.index(candidate.decision.quality)
    return demand.vram_reserved_bytes, demand.ram_bytes, quality, *times_of(candidate, price)


def times_of(candidate: Candidate, price: Pricer) -> tuple[float, ...]:
    """Its seconds, and those with one term after the other slower."""
    told = candidate.demand.seconds_if_slower
    return candidate.demand.seconds_per_call, *(told[term] for term in price.slower)


def is_faster(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether times are shorter in the third digit, whichever term is slower."""
    return one[0] * APART < other[0] and all(left < right for left, right in zip(one[1:], other[1:], strict=True))


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
