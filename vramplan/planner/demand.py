"""What a candidate asks of the machine: memory by phase, RAM, and time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vramplan.hardware.types import Accelerator, Budget, Rates
from vramplan.pipeline.types import PhaseName, PipelineSpec, Use
from vramplan.planner.footprint import Estimate, Footprint, Work
from vramplan.planner.loading import Load, LoadDemand, load_demand, load_of
from vramplan.planner.residency import Moment, replay
from vramplan.residuals import Basis
from vramplan.strategies.base import Decode, Hold, Placement
from vramplan.units import format_bytes
from vramplan.workload import Workload

# The share of the memory's peak rate that kernels without products reach. Assumed.
_TRAFFIC_EFFICIENCY = 0.85
# What Python and the driver take to launch one kernel, which the device waits for where kernels are small. Assumed.
_LAUNCH_SECONDS = 6e-6
# What a disk reads, in bytes per second: an NVMe drive of a laptop on PCIe 3.0. Assumed.
DISK_BYTES_PER_S = 2e9
# The share of what is hidden behind something longer that is paid all the same: copies take memory bandwidth, and a
# link may be slower than it is taken to be. Assumed.
_OVERLAP_COST = 0.05
# What waiting for one transfer costs beside the transfer: a synchronisation and a launch. Assumed.
PAUSE_SECONDS = 1e-4
# Where neither a profile nor a measurement says: a PCIe 3.0 x16 card of the 12 GiB class.
DEFAULT_RATES = Rates(
    memory_bytes_per_s=360e9,
    link_bytes_per_s=12e9,
    half_flops_per_s=50e12,
    reached=0.6,
    source="assumed: a mid-range card on PCIe 3.0 x16",
)

CPU_RATES = Rates(
    memory_bytes_per_s=40e9,
    link_bytes_per_s=40e9,
    half_flops_per_s=2e11,
    reached=0.6,
    source="assumed: a few cores in float32",
)

Bottleneck = Literal["compute", "transfer", "launch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseDemand:
    """The highest moment of one phase on the device, in bytes: what runs, and what is there with it."""

    __pydantic_config__ = {"extra": "forbid"}

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

    __pydantic_config__ = {"extra": "forbid"}

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


def price(
    spec: PipelineSpec,
    workload: Workload,
    placement: Mapping[str, Placement],
    decode: Sequence[Decode],
    *,
    footprint: Footprint,
    accelerator: Accelerator | None,
) -> Demand:
    """The demand of one candidate. On the CPU everything is charged to RAM and nothing moves."""
    return Pricer(spec, workload, footprint, accelerator)(placement, tuple(decode))


class Pricer:
    """Prices candidates of one pipeline, workload and device; what they share is worked out once."""

    def __init__(
        self, spec: PipelineSpec, workload: Workload, footprint: Footprint, accelerator: Accelerator | None
    ) -> None:
        self.spec = spec
        self.steps = workload.num_inference_steps
        self.footprint = footprint
        self.accelerator = accelerator
        self.rates = (accelerator.rates or DEFAULT_RATES) if accelerator else CPU_RATES
        self._components = {component.name: component for component in spec.components}
        self._skips = any(use.optional for use in spec.uses)
        self._holds: dict[tuple[str, Placement], Hold] = {}
        self._loads: dict[tuple[str, Placement], Load] = {}
        self._decodes: dict[tuple[Decode, ...], dict[Use, _Need]] = {}

    def __call__(self, placement: Mapping[str, Placement], decode: tuple[Decode, ...]) -> Demand:
        """The demand of one candidate."""
        needs = self._needs(decode)
        holds = {name: self._hold(name, setting) for name, setting in placement.items()}
        moments = replay(self.spec, holds)
        skipped = replay(self.spec, holds, skip_optional=True) if self._skips else []
        demands = [self._demand(moment, needs[moment.use]) for moment in (*moments, *skipped)]
        phases = _highest(demands)
        clock = _Clock(needs, holds, self.rates)
        step, call = clock.time(moments, self.steps)
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
            seconds_per_step=step,
            seconds_per_call=call,
            transfer_seconds_per_step=sum(clock.transfer(moment) for moment in moments if moment.repeat),
            bottleneck=clock.bottleneck(moments),
            basis=weakest_basis(need.activation.basis for need in needs.values()),
            phases=phases,
            load=load,
        )

    def _needs(self, decode: tuple[Decode, ...]) -> dict[Use, _Need]:
        found = self._decodes.get(decode)
        if found is None:
            found = self._decodes[decode] = {
                use: _Need(
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

    def _demand(self, moment: Moment, need: _Need) -> PhaseDemand:
        workspace = self.footprint.workspace_bytes if self.accelerator is not None else 0
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
        loads = {}
        for name, setting in placement.items():
            if self._components[name].device is not None:
                return None
            found = self._loads.get((name, setting))
            if found is None:
                found = load_of(self._components[name], setting, self._hold(name, setting))
                self._loads[name, setting] = found
            loads[name] = found
        return load_demand(loads)


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


class _Need:
    """What a use needs whatever the placement: activations, seconds of compute and of launching, forwards."""

    __slots__ = ("activation", "forwards", "kernels", "launches")

    def __init__(self, activation: Estimate, work: Work, rates: Rates) -> None:
        products = work.flops / (rates.half_flops_per_s * rates.reached)
        self.activation = activation
        self.kernels = products + work.traffic_bytes / (rates.memory_bytes_per_s * _TRAFFIC_EFFICIENCY)
        self.launches = work.launches * _LAUNCH_SECONDS
        self.forwards = work.forwards


@dataclass(frozen=True, slots=True)
class _Clock:
    """Turns moments into seconds: computing and launching, whichever is longer, and bytes over the link."""

    needs: Mapping[Use, _Need]
    holds: Mapping[str, Hold]
    rates: Rates

    def time(self, moments: Sequence[Moment], steps: int) -> tuple[float, float]:
        """Seconds per denoising step, and per call with this many steps."""
        first = sum(self._seconds(moment) for moment in moments if moment.use.in_loop and not moment.repeat)
        step = sum(self._seconds(moment) for moment in moments if moment.repeat)
        rest = sum(self._seconds(moment) for moment in moments if not moment.use.in_loop)
        read = sum(hold.read_bytes for hold in self.holds.values()) / DISK_BYTES_PER_S
        left = sum(moment.loaded_bytes - moment.sent_back_bytes for moment in moments)
        freed = left / (self.rates.link_bytes_per_s * 0.5)  # maybe_free_model_hooks at the end of the call
        return step, rest + first + step * (steps - 1) + freed + read

    def transfer(self, moment: Moment) -> float:
        """Seconds of moving weights for this use, waits between the transfers left out."""
        hold, forwards = self.holds[moment.use.component], self.needs[moment.use].forwards
        moved = forwards * (hold.moved_in_bytes + hold.moved_out_bytes + hold.waited_bytes)
        whole = moment.loaded_bytes + moment.sent_back_bytes
        read = forwards * hold.disk_bytes / DISK_BYTES_PER_S
        return read + (moved + whole) / (self.rates.link_bytes_per_s * hold.rate)

    def bottleneck(self, moments: Sequence[Moment]) -> Bottleneck:
        """What takes longest in a step (in a call, for a pipeline without a loop)."""
        step = [moment for moment in moments if moment.repeat] or moments
        took: dict[Bottleneck, float] = {
            "compute": sum(self.needs[moment.use].kernels for moment in step),
            "transfer": sum(self.transfer(moment) + self._pauses(moment) for moment in step),
            "launch": sum(self.needs[moment.use].launches for moment in step),
        }
        return max(took, key=lambda name: took[name])

    def _seconds(self, moment: Moment) -> float:
        hold, need = self.holds[moment.use.component], self.needs[moment.use]
        busy = max(need.kernels, need.launches)
        moved = self.transfer(moment) + self._pauses(moment)
        if not hold.overlapped:
            return busy + moved
        waited = need.forwards * hold.waited_bytes / (self.rates.link_bytes_per_s * hold.rate)
        hidden = moved - waited
        return max(busy, hidden) + _OVERLAP_COST * min(busy, hidden) + waited

    def _pauses(self, moment: Moment) -> float:
        return self.needs[moment.use].forwards * self.holds[moment.use.component].pauses * PAUSE_SECONDS
