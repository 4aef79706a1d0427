"""What a candidate asks of the machine: memory by phase, RAM, and time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vramplan.hardware.types import Accelerator, Budget
from vramplan.pipeline.types import PhaseName, PipelineSpec, Use
from vramplan.planner.clock import CPU_RATES, DEFAULT_RATES, Bottleneck, Clock, UseCost
from vramplan.planner.footprint import Footprint
from vramplan.planner.loading import Load, LoadDemand, load_demand, load_of
from vramplan.planner.residency import ReplayedUse, replay, schedule
from vramplan.planner.residuals import Basis
from vramplan.strategies.base import Decode, Hold, Placement
from vramplan.units import format_bytes
from vramplan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseDemand:
    """The highest moment of one phase on the device, in bytes: what runs, and what is there with it."""

    name: PhaseName
    component: str
    on_device: tuple[str, ...]
    weights_bytes: int
    activation_bytes: int
    workspace_bytes: int
    reserved_bytes: int

    @property
    def allocated_bytes(self) -> int:
        """All of it together; `reserved_bytes` is what the caching allocator takes from the device for it."""
        return self.weights_bytes + self.activation_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The price of a candidate. `basis` is that of its weakest number; weights are always derived.

    `transfer_seconds_per_step` is what moving weights takes, whether or not it hides behind compute;
    `bottleneck` is what most of a step is spent on. `ram_bytes` is the most of running and loading; `load` is the
    highest moment of loading, None for a pipeline that is loaded already or stays on the CPU.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentPrice:
    """What one component adds to the price of a candidate of which nothing lingers on the device.

    `hold` and `load` as they are, None for a component that is loaded already. `extra_bytes` is what is reserved at
    the component's highest moment beside the idle weights of all, None for one that is never used. `seconds` are those
    of a call.
    """

    hold: Hold
    load: Load | None
    extra_bytes: int | None
    seconds: float


class Pricer:
    """Prices candidates of one pipeline, workload and device; what they share is worked out once."""

    def __init__(
        self, spec: PipelineSpec, workload: Workload, footprint: Footprint, accelerator: Accelerator | None
    ) -> None:
        self.spec = spec
        self.steps, self.evaluations = workload.num_inference_steps, footprint.evaluations
        self.footprint = footprint
        self.accelerator = accelerator
        self.rates = (accelerator.rates or DEFAULT_RATES) if accelerator else CPU_RATES
        # A pipeline any part of which is loaded already is not loaded again.
        self.loaded = any(component.device is not None for component in spec.components)
        self._components = {component.name: component for component in spec.components}
        self._skips = any(use.optional for use in spec.uses)
        self._holds: dict[tuple[str, Placement], Hold] = {}
        self._loads: dict[tuple[str, Placement], Load] = {}
        self._decodes: dict[tuple[Decode, ...], dict[Use, UseCost]] = {}
        self._parts: dict[tuple[str, Placement, tuple[Decode, ...]], ComponentPrice] = {}

    def __call__(self, placement: Mapping[str, Placement], decode: tuple[Decode, ...]) -> Demand:
        """The demand of one candidate."""
        needs = self._needs(decode)
        holds = {name: self._hold(name, setting) for name, setting in placement.items()}
        moments = replay(self.spec, holds)
        skipped = replay(self.spec, holds, skip_optional=True) if self._skips else []
        demands = [self._demand(moment, needs[moment.use]) for moment in (*moments, *skipped)]
        phases = _highest(demands)
        clock = Clock(needs, holds, self.rates)
        step, call = clock.time(moments, self.evaluations)
        allocated = max((demand.allocated_bytes for demand in demands), default=0)
        reserved = max((phase.reserved_bytes for phase in phases), default=0)
        here = self.accelerator is not None
        load = self._load(placement) if here else None
        ram, pinned = _host(holds, applying=load is None)
        return Demand(
            vram_allocated_bytes=allocated if here else 0,
            vram_reserved_bytes=reserved if here else 0,
            ram_bytes=max(ram, load.ram_bytes if load else 0) if here else allocated,
            pinned_bytes=pinned if here else 0,
            disk_bytes=sum(hold.disk_bytes for hold in holds.values()),
            seconds_per_step=step * self.evaluations / self.steps,
            seconds_per_call=call,
            transfer_seconds_per_step=sum(clock.transfer(moment) for moment in moments if moment.repeat),
            bottleneck=clock.bottleneck(moments),
            basis=weakest_basis(need.activation.basis for need in needs.values()),
            phases=phases,
            load=load,
        )

    @property
    def workspace_bytes(self) -> int:
        """What matrix products hold on the device all along, where activations do not contain it."""
        return self.footprint.workspace_bytes if self.accelerator is not None else 0

    def part(self, name: str, setting: Placement, decode: tuple[Decode, ...]) -> ComponentPrice:
        """What one component adds to the price, by this setting and decode."""
        key = name, setting, decode
        found = self._parts.get(key)
        if found is None:
            found = self._parts[key] = self._part(name, setting, decode)
        return found

    def _part(self, name: str, setting: Placement, decode: tuple[Decode, ...]) -> ComponentPrice:
        needs, hold = self._needs(decode), self._hold(name, setting)
        uses = [use for use in self.spec.uses if use.component == name]
        moments = [
            ReplayedUse(use=use, weights_bytes=0, on_device=(), repeat=repeat)
            for use, repeat in schedule(uses, skip_optional=False)
        ]
        clock = Clock(needs, {name: hold}, self.rates)
        beside = [hold.running_bytes - hold.idle_bytes + needs[use].activation.reserved_bytes for use in uses]
        return ComponentPrice(
            hold=hold,
            load=None if self.loaded else self._load_of(name, setting),
            extra_bytes=max(beside, default=None),
            seconds=clock.time(moments, self.evaluations)[1],
        )

    def _needs(self, decode: tuple[Decode, ...]) -> dict[Use, UseCost]:
        found = self._decodes.get(decode)
        if found is None:
            found = self._decodes[decode] = {
                use: UseCost(
                    activation=self.footprint.activation(use, decode),
                    work=self.footprint.work(use, decode),
                    rates=self.rates,
                )
                for use in self.spec.uses
            }
        return found

    def _hold(self, name: str, setting: Placement) -> Hold:
        found = self._holds.get((name, setting))
        if found is None:
            found = self._holds[name, setting] = setting.hold(self._components[name], self.spec)
        return found

    def _demand(self, moment: ReplayedUse, need: UseCost) -> PhaseDemand:
        workspace = self.workspace_bytes
        return PhaseDemand(
            name=moment.use.phase,
            component=moment.use.component,
            on_device=moment.on_device,
            weights_bytes=moment.weights_bytes,
            activation_bytes=need.activation.size_bytes,
            workspace_bytes=workspace,
            reserved_bytes=moment.weights_bytes + workspace + need.activation.reserved_bytes,
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


def _host(holds: Mapping[str, Hold], *, applying: bool) -> tuple[int, int]:
    """RAM and the pinned part of it, at the higher of two times: while what goes first encodes, and from then on.

    With `applying`, what that takes beside, of the component that takes most; what is on disk is read all along.
    """
    held, pinned = [0, 0], [0, 0]
    transient = 0
    for hold in holds.values():
        pinned[hold.freed] += hold.pinned_bytes
        held[hold.freed] += hold.pinned_bytes + hold.host_bytes
        if applying or hold.disk_bytes:
            transient = max(transient, hold.host_transient_bytes)
    return max(held) + transient, max(pinned)


def _highest(demands: Sequence[PhaseDemand]) -> tuple[PhaseDemand, ...]:
    """The highest moment of each phase, in the order of the call: by what is reserved, which is what must fit."""
    found: dict[PhaseName, PhaseDemand] = {}
    for demand in demands:
        before = found.get(demand.name)
        if before is None or demand.reserved_bytes > before.reserved_bytes:
            found[demand.name] = demand
    return tuple(found.values())


def weakest_basis(bases: Iterable[Basis]) -> Basis:
    """What the least known of several numbers rests on; weights alone are derived."""
    order: tuple[Basis, ...] = ("assumed", "derived", "simulated", "measured")
    found = set(bases)
    return next((basis for basis in order if basis in found), "derived")


def fits_sentence(demand: Demand, budget: Budget) -> str:
    """How near the limit the demand is: `needs 9.80 GiB of 11.20 GiB VRAM and 15.00 GiB of 40.00 GiB RAM`."""
    parts = [f"{format_bytes(demand.ram_bytes)} of {format_bytes(budget.ram_bytes)} RAM"]
    if budget.vram_bytes is not None:
        vram = f"{format_bytes(demand.vram_reserved_bytes)} of {format_bytes(budget.vram_bytes)} VRAM"
        parts.insert(0, vram)
    if demand.disk_bytes:
        free = "" if budget.disk_bytes is None else f" of {format_bytes(budget.disk_bytes)}"
        parts.append(f"{format_bytes(demand.disk_bytes)}{free} disk")
    return f"needs {' and '.join([', '.join(parts[:-1]), parts[-1]] if parts[1:] else parts)}"


def shortage(demand: Demand, budget: Budget) -> tuple[int, str] | None:
    """By how much the candidate is short in all, and the sentences that say so with both numbers."""
    found = []
    if budget.vram_bytes is not None and demand.vram_reserved_bytes > budget.vram_bytes:
        phase = max(demand.phases, key=lambda item: item.reserved_bytes)
        where = f"{phase.name} ({phase.component})"
        found.append(_short(where, "VRAM", demand.vram_reserved_bytes, budget.vram_bytes))
    if demand.ram_bytes > budget.ram_bytes:
        load = demand.load
        loading = load is not None and load.ram_bytes == demand.ram_bytes
        where = f"loading {load.component}" if load is not None and loading else "the plan"
        found.append(_short(where, "RAM", demand.ram_bytes, budget.ram_bytes))
    if budget.disk_bytes is not None and demand.disk_bytes > budget.disk_bytes:
        found.append(_short("the plan", "disk", demand.disk_bytes, budget.disk_bytes))
    return (sum(size for size, _ in found), "; ".join(text for _, text in found)) if found else None


def _short(where: str, memory: str, needed: int, usable: int) -> tuple[int, str]:
    deficit = needed - usable
    return deficit, (
        f"{where} needs {format_bytes(needed)} of {memory}, {format_bytes(usable)} may be used: "
        f"short by {format_bytes(deficit)}"
    )
