"""The price of a candidate: device memory by phase, RAM, disk, and time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum

import numpy as np

from vramplan.hardware.rates import slower
from vramplan.hardware.types import Accelerator, Budget
from vramplan.pipeline.types import PhaseName, PipelineSpec, Use
from vramplan.planner import times
from vramplan.planner.clock import CPU_RATES, DEFAULT_RATES, Bottleneck, Clock, UseCost
from vramplan.planner.columns import Column, ComponentPrice, make_column
from vramplan.planner.footprint import Footprint
from vramplan.planner.hold_arrays import hold_arrays
from vramplan.planner.loading import Load, LoadDemand, load_demand, load_of
from vramplan.planner.residency import ReplayedUse, replay, schedule
from vramplan.planner.residuals import Basis
from vramplan.strategies.base import Decode, Hold, Placement
from vramplan.units import format_bytes
from vramplan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseDemand:
    """The peak of one phase on the device, in bytes: the component that runs, and those on the device with it.

    `blocks` counts, of each component that is streamed, the blocks that stay in this phase, and all.
    """

    name: PhaseName
    component: str
    on_device: tuple[str, ...]
    weights_bytes: int
    activation_bytes: int
    workspace_bytes: int
    reserved_bytes: int
    blocks: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def allocated_bytes(self) -> int:
        """All tensors together; `reserved_bytes` is the memory that the caching allocator takes for them."""
        return self.weights_bytes + self.activation_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The price of a candidate. `basis` is the basis of its weakest number; weights are always derived.

    `transfer_seconds_per_step` is the time of moving weights, hidden behind compute or not; `bottleneck` is the longest
    part of a step. The ranges are those of the seconds (`times.seconds_range`), `seconds_if_slower` a call with one
    term slower (`rates.slower`): None and empty where it is not known how far off times are. `ram_bytes` is the higher
    of running and loading; `load` is the peak of loading, None for a pipeline that is loaded already or stays on the
    CPU.
    """

    vram_allocated_bytes: int
    vram_reserved_bytes: int
    ram_bytes: int
    pinned_bytes: int
    disk_bytes: int
    seconds_per_step: float
    seconds_per_call: float
    transfer_seconds_per_step: float
    bottleneck: Bottleneck
    basis: Basis
    phases: tuple[PhaseDemand, ...]
    load: LoadDemand | None = None
    seconds_per_step_range: tuple[float, float] | None = None
    seconds_per_call_range: tuple[float, float] | None = None
    seconds_if_slower: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostDemand:
    """The demand of a plan on the host, in bytes: the one place that says what counts as RAM.

    `ram_bytes` is memory of the process's own, of which `pinned_bytes` is page-locked. Pages of files that are mapped
    and unchanged are not part of it: the system takes them back when it needs them. `disk_bytes` are kept in files of
    the plan's own.
    """

    ram_bytes: int
    pinned_bytes: int
    disk_bytes: int


class Pricer:
    """Prices candidates of one pipeline, workload and device; shared parts are computed once."""

    def __init__(
        self, spec: PipelineSpec, workload: Workload, footprint: Footprint, accelerator: Accelerator | None
    ) -> None:
        self.spec = replace(spec, uses=tuple(use for use in spec.uses if footprint.makes(use)))
        self.evaluations = footprint.evaluations
        self._per_step = self.evaluations / workload.num_inference_steps
        self.footprint = footprint
        self.accelerator = accelerator
        self.rates = (accelerator.rates or DEFAULT_RATES) if accelerator else CPU_RATES
        self.slower = slower(self.rates)
        self.loaded = is_loaded(spec)
        self._components = {component.name: component for component in spec.components}
        self._skips = any(use.optional for use in self.spec.uses)
        self._holds: dict[tuple[str, Placement], Hold] = {}
        self._loads: dict[tuple[str, Placement], Load] = {}
        self._decodes: dict[tuple[Decode, ...], dict[Use, UseCost]] = {}
        self._prices: dict[tuple[str, tuple[UseCost, ...]], dict[Placement, ComponentPrice]] = {}
        self._columns: dict[tuple[str, tuple[UseCost, ...], tuple[Placement, ...]], Column] = {}

    def __call__(self, placement: Mapping[str, Placement], decode: tuple[Decode, ...]) -> Demand:
        """Return the demand of one candidate."""
        needs = self._needs(decode)
        holds = {name: self._hold(name, setting) for name, setting in placement.items()}
        replayed_uses = replay(self.spec, holds)
        skipped = replay(self.spec, holds, skip_optional=True) if self._skips else []
        demands = [self._demand(replayed, needs[replayed.use]) for replayed in (*replayed_uses, *skipped)]
        phases = _phase_peaks(demands)
        clock = Clock(needs, holds, self.rates)
        (step, call), *longer = self._times_of(placement, decode, clock, replayed_uses)
        allocated = max((demand.allocated_bytes for demand in demands), default=0)
        reserved = max((phase.reserved_bytes for phase in phases), default=0)
        here = self.accelerator is not None
        load = self._load(placement) if here else None
        host = host_demand(holds, load)
        return Demand(
            vram_allocated_bytes=allocated if here else 0,
            vram_reserved_bytes=reserved if here else 0,
            ram_bytes=host.ram_bytes if here else allocated,
            pinned_bytes=host.pinned_bytes if here else 0,
            disk_bytes=host.disk_bytes,
            seconds_per_step=step * self._per_step,
            seconds_per_call=call,
            transfer_seconds_per_step=self._per_step
            * sum(clock.transfer(item) for item in replayed_uses if item.repeat),
            bottleneck=clock.bottleneck(replayed_uses),
            basis=weakest_basis(need.activation.basis for need in needs.values()),
            phases=phases,
            load=load,
            seconds_per_step_range=times.seconds_range(
                step * self._per_step, [one * self._per_step for one, _ in longer]
            ),
            seconds_per_call_range=times.seconds_range(call, [whole for _, whole in longer]),
            seconds_if_slower={term: whole for term, (_, whole) in zip(self.slower, longer, strict=True)},
        )

    def _with_slower(self, clock: Clock, replayed_uses: Sequence[ReplayedUse]) -> list[tuple[float, float]]:
        """Return the seconds of one evaluation and of a call, then those with one term after the other slower."""
        clocks = (Clock(clock.costs, clock.holds, rates, factor) for factor, rates in self.slower.values())
        return [item.time(replayed_uses, self.evaluations) for item in (clock, *clocks)]

    def _times_of(
        self,
        placement: Mapping[str, Placement],
        decode: tuple[Decode, ...],
        clock: Clock,
        replayed_uses: Sequence[ReplayedUse],
    ) -> list[tuple[float, float]]:
        """Return the same of a candidate: the sum over its components, unless one lingers and depends on others."""
        if any(hold.lingers for hold in clock.holds.values()):
            return self._with_slower(clock, replayed_uses)
        each = [self._component_prices(name, [setting], decode)[0].times for name, setting in placement.items()]
        return [(fsum(step for step, _ in pairs), fsum(call for _, call in pairs)) for pairs in zip(*each, strict=True)]

    @property
    def workspace_bytes(self) -> int:
        """Bytes that matrix products hold on the device throughout; 0 if activations contain them."""
        return self.footprint.workspace_bytes if self.accelerator is not None else 0

    def column(self, name: str, settings: tuple[Placement, ...], decode: tuple[Decode, ...]) -> Column:
        """Return the share of one component in the price under each of these settings, with this decode, as arrays."""
        key = name, self._own_needs(name, decode), settings
        found = self._columns.get(key)
        if found is None:
            found = self._columns[key] = make_column(settings, self._component_prices(name, settings, decode))
        return found

    def _own_needs(self, name: str, decode: tuple[Decode, ...]) -> tuple[UseCost, ...]:
        """The costs of one component's uses: of most components the same under every decode."""
        needs = self._needs(decode)
        return tuple(needs[use] for use in self.spec.uses if use.component == name)

    def _component_prices(
        self, name: str, settings: Sequence[Placement], decode: tuple[Decode, ...]
    ) -> list[ComponentPrice]:
        known = self._prices.setdefault((name, self._own_needs(name, decode)), {})
        missing = [setting for setting in dict.fromkeys(settings) if setting not in known]
        if missing:
            known.update(zip(missing, self._new_prices(name, missing, self._needs(decode)), strict=True))
        return [known[setting] for setting in settings]

    def _new_prices(
        self, name: str, settings: Sequence[Placement], needs: Mapping[Use, UseCost]
    ) -> list[ComponentPrice]:
        uses = [use for use in self.spec.uses if use.component == name]
        holds = [self._hold(name, setting) for setting in settings]
        looping = any(use.in_loop for use in uses)
        found = []
        for setting, hold, each in zip(settings, holds, self._times(name, uses, holds, needs), strict=True):
            beside = hold.bytes_beside(in_loop=False), hold.bytes_beside(in_loop=looping)
            extra: dict[bool, int] = {}
            for use in uses:
                own = hold.running_bytes - beside[use.in_loop] + needs[use].activation.reserved_bytes
                extra[use.in_loop] = max(own, extra.get(use.in_loop, own))
            price = ComponentPrice(
                hold=hold,
                load=None if self.loaded else self._load_of(name, setting),
                beside_bytes=beside,
                extra_bytes=(extra.get(False), extra.get(True)),
                times=each,
            )
            found.append(price)
        return found

    def _times(
        self, name: str, uses: Sequence[Use], holds: Sequence[Hold], needs: Mapping[Use, UseCost]
    ) -> list[tuple[tuple[float, float], ...]]:
        """Return the times that one component takes under each hold (`ComponentPrice.times`)."""
        replayed_uses = [
            ReplayedUse(use=use, weights_bytes=0, on_device=(), repeat=repeat)
            for use, repeat in schedule(uses, skip_optional=False)
        ]
        found: list[tuple[tuple[float, float], ...]] = [()] * len(holds)
        for places, several in hold_arrays(holds):
            times = self._with_slower(Clock(needs, {name: several}, self.rates), replayed_uses)
            flat = [np.broadcast_to(value, len(places)).tolist() for pair in times for value in pair]
            for place, line in zip(places, zip(*flat, strict=True), strict=True):
                found[place] = tuple(zip(line[::2], line[1::2], strict=True))
        return found

    def _needs(self, decode: tuple[Decode, ...]) -> dict[Use, UseCost]:
        found = self._decodes.get(decode)
        if found is None:
            found = self._decodes[decode] = {
                use: UseCost.of(self.footprint.activation(use, decode), self.footprint.work(use, decode), self.rates)
                for use in self.spec.uses
            }
        return found

    def _hold(self, name: str, setting: Placement) -> Hold:
        found = self._holds.get((name, setting))
        if found is None:
            found = self._holds[name, setting] = setting.hold(self._components[name], self.spec)
        return found

    def _demand(self, replayed: ReplayedUse, need: UseCost) -> PhaseDemand:
        workspace = self.workspace_bytes
        return PhaseDemand(
            name=replayed.use.phase,
            component=replayed.use.component,
            on_device=replayed.on_device,
            weights_bytes=replayed.weights_bytes,
            activation_bytes=need.activation.size_bytes,
            workspace_bytes=workspace,
            reserved_bytes=replayed.weights_bytes + workspace + need.activation.reserved_bytes,
            blocks=replayed.blocks,
        )

    def _load(self, placement: Mapping[str, Placement]) -> LoadDemand | None:
        if self.loaded:
            return None
        return load_demand({name: self._load_of(name, setting) for name, setting in placement.items()})

    def _load_of(self, name: str, setting: Placement) -> Load:
        found = self._loads.get((name, setting))
        if found is None:
            found = load_of(self._components[name], setting, self._hold(name, setting))
            self._loads[name, setting] = found
        return found


def is_loaded(spec: PipelineSpec) -> bool:
    """Whether the pipeline is loaded. One of which any part is loaded already is not loaded again."""
    return any(component.device is not None for component in spec.components)


def host_demand_of(spec: PipelineSpec, placement: Mapping[str, Placement]) -> HostDemand:
    """Return the host memory that these placements need in addition to an accelerator's."""
    holds = {name: setting.hold(spec.component(name), spec) for name, setting in placement.items()}
    if is_loaded(spec):
        return host_demand(holds, None)
    loads = {name: load_of(spec.component(name), setting, holds[name]) for name, setting in placement.items()}
    return host_demand(holds, load_demand(loads))


def host_demand(holds: Mapping[str, Hold], load: LoadDemand | None) -> HostDemand:
    """Return the highest need of three times: loading, encoding first, and the rest of the call.

    Without a `load`, RAM includes the largest transient of applying a plan; reading from disk has one in any case.
    """
    applying = load is None
    held, pinned = [0, 0], [0, 0]
    transient = shared = 0
    for hold in holds.values():
        shared = max(shared, hold.shared_pinned_bytes)
        pinned[hold.freed] += hold.pinned_bytes
        held[hold.freed] += hold.pinned_bytes + hold.host_bytes
        if applying or hold.disk_bytes:
            transient = max(transient, hold.host_transient_bytes)
    ram = max(max(held) + shared + transient, load.ram_bytes if load else 0)
    return HostDemand(
        ram_bytes=ram, pinned_bytes=max(pinned) + shared, disk_bytes=sum(hold.disk_bytes for hold in holds.values())
    )


def _phase_peaks(demands: Sequence[PhaseDemand]) -> tuple[PhaseDemand, ...]:
    """Return the peak of each phase in the order of the call, by reserved memory, which has to fit."""
    found: dict[PhaseName, PhaseDemand] = {}
    for demand in demands:
        before = found.get(demand.name)
        if before is None or demand.reserved_bytes > before.reserved_bytes:
            found[demand.name] = demand
    return tuple(found.values())


def weakest_basis(bases: Iterable[Basis]) -> Basis:
    """Return the weakest of several bases; `derived` if there are none, as for weights."""
    order: tuple[Basis, ...] = ("assumed", "derived", "simulated", "measured")
    found = set(bases)
    return next((basis for basis in order if basis in found), "derived")


def fits_sentence(demand: Demand, budget: Budget) -> str:
    """Compare the demand with the budget: `needs 9.80 GiB of 11.20 GiB VRAM and 15.00 GiB of 40.00 GiB RAM`."""
    parts = [f"{format_bytes(demand.ram_bytes)} of {format_bytes(budget.ram_bytes)} RAM"]
    if budget.vram_bytes is not None:
        parts.insert(0, f"{format_bytes(demand.vram_reserved_bytes)} of {format_bytes(budget.vram_bytes)} VRAM")
    if demand.disk_bytes:
        free = "" if budget.disk_bytes is None else f" of {format_bytes(budget.disk_bytes)}"
        parts.append(f"{format_bytes(demand.disk_bytes)}{free} disk")
    return f"needs {' and '.join([', '.join(parts[:-1]), parts[-1]] if parts[1:] else parts)}"


def shortage(demand: Demand, budget: Budget) -> tuple[int, str] | None:
    """Return the total deficit in bytes and its sentences with both numbers; None if the candidate fits."""
    found = []
    if budget.vram_bytes is not None and demand.vram_reserved_bytes > budget.vram_bytes:
        phase = max(demand.phases, key=lambda item: item.reserved_bytes)
        where = f"{phase.name} ({phase.component})"
        found.append(_deficit(where, "VRAM", demand.vram_reserved_bytes, budget.vram_bytes))
    if demand.ram_bytes > budget.ram_bytes:
        load = demand.load
        loading = load is not None and load.ram_bytes == demand.ram_bytes
        where = f"loading {load.component}" if load is not None and loading else "the plan"
        found.append(_deficit(where, "RAM", demand.ram_bytes, budget.ram_bytes))
    if budget.disk_bytes is not None and demand.disk_bytes > budget.disk_bytes:
        found.append(_deficit("the plan", "disk", demand.disk_bytes, budget.disk_bytes))
    return (sum(size for size, _ in found), "; ".join(text for _, text in found)) if found else None


def _deficit(where: str, memory: str, needed: int, usable: int) -> tuple[int, str]:
    deficit = needed - usable
    return deficit, (
        f"{where} needs {format_bytes(needed)} of {memory}, {format_bytes(usable)} may be used: "
        f"short by {format_bytes(deficit)}"
    )
