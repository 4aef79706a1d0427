"""What a candidate asks of the machine: memory by phase, RAM, and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vramplan.hardware.types import Accelerator, Budget, Rates
from vramplan.pipeline.types import PhaseName, PipelineSpec
from vramplan.planner.footprint import Basis, Footprint
from vramplan.planner.residency import Moment, replay
from vramplan.strategies.base import Decode, Hold, Placement
from vramplan.units import format_bytes
from vramplan.workload import Workload

# The share of the peak rate a pipeline's kernels reach: FLUX.1-dev takes 12 s for 50 steps on an H100
# (Hugging Face blog diffusers-quantization), 0.59 of its peak; CogVideoX-5b 180 s on an A100 (its model
# card), 0.66. Used to rank, not to promise.
_EFFICIENCY = 0.6
# What waiting for one transfer costs beside the transfer: a synchronisation and a launch. Assumed.
_PAUSE_SECONDS = 1e-4
# Where neither a profile nor a measurement says: a PCIe 3.0 x16 card of the 12 GiB class.
DEFAULT_RATES = Rates(
    memory_bytes_per_s=360e9,
    link_bytes_per_s=12e9,
    half_flops_per_s=50e12,
    source="assumed: a mid-range card on PCIe 3.0 x16",
)

CPU_RATES = Rates(
    memory_bytes_per_s=40e9,
    link_bytes_per_s=40e9,
    half_flops_per_s=2e11,
    source="assumed: a few cores in float32",
)


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

    `transfer_seconds_per_step` is what moving weights takes, whether or not it hides behind compute.
    """

    __pydantic_config__ = {"extra": "forbid"}

    vram_allocated_bytes: int
    vram_reserved_bytes: int
    ram_bytes: int
    pinned_bytes: int
    seconds_per_step: float
    seconds_per_call: float
    transfer_seconds_per_step: float
    basis: Basis
    phases: tuple[PhaseDemand, ...]


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
    holds = {component.name: placement[component.name].hold(component, spec) for component in spec.components}
    moments = replay(spec, holds)
    skipped = [] if not any(use.optional for use in spec.uses) else replay(spec, holds, skip_optional=True)
    all_demands = _demands([*moments, *skipped], footprint, decode, on_accelerator=accelerator is not None)
    phases = _highest(all_demands)
    clock = _Clock(footprint, decode, holds, (accelerator.rates or DEFAULT_RATES) if accelerator else CPU_RATES)
    step, call = clock.time(moments, workload.num_inference_steps)
    allocated = max((demand.allocated_bytes for demand in all_demands), default=0)
    ram, pinned = _host(spec, holds)
    return Demand(
        vram_allocated_bytes=allocated if accelerator else 0,
        vram_reserved_bytes=max((p.reserved_bytes for p in phases), default=0) if accelerator else 0,
        ram_bytes=ram if accelerator else allocated,
        pinned_bytes=pinned if accelerator else 0,
        seconds_per_step=step,
        seconds_per_call=call,
        transfer_seconds_per_step=sum(clock.transfer(moment) for moment in moments if moment.repeat),
        basis=_weakest(footprint, spec, decode),
        phases=phases,
    )


def _demands(
    moments: Sequence[Moment], footprint: Footprint, decode: Sequence[Decode], *, on_accelerator: bool
) -> list[PhaseDemand]:
    return [
        _demand(moment, footprint, decode, footprint.workspace_bytes if on_accelerator else 0) for moment in moments
    ]


def _demand(moment: Moment, footprint: Footprint, decode: Sequence[Decode], workspace: int) -> PhaseDemand:
    activation = footprint.activation(moment.use, decode).size_bytes
    return PhaseDemand(
        name=moment.use.phase,
        component=moment.use.component,
        on_device=moment.on_device,
        weights_bytes=moment.weights_bytes,
        activation_bytes=activation,
        workspace_bytes=workspace,
        reserved_bytes=moment.weights_bytes + workspace + int(activation * footprint.slack),
    )


def _highest(demands: Sequence[PhaseDemand]) -> tuple[PhaseDemand, ...]:
    """The highest moment of each phase, in the order of the call: by what is reserved, which is what must fit."""
    found: dict[PhaseName, PhaseDemand] = {}
    for demand in demands:
        before = found.get(demand.name)
        if before is None or demand.reserved_bytes > before.reserved_bytes:
            found[demand.name] = demand
    return tuple(found.values())


def _host(spec: PipelineSpec, holds: Mapping[str, Hold]) -> tuple[int, int]:
    """RAM and the pinned part of it: what offloading holds, or what converting while loading needs."""
    pinned = sum(hold.pinned_bytes for hold in holds.values())
    held = pinned + sum(hold.host_bytes for hold in holds.values())
    transient = max((hold.host_transient_bytes for hold in holds.values()), default=0)
    loading = sum(component.weight_bytes for component in spec.components if component.converted_at_load)
    return max(held + transient, loading), pinned


def _weakest(footprint: Footprint, spec: PipelineSpec, decode: Sequence[Decode]) -> Basis:
    order: tuple[Basis, ...] = ("assumed", "derived", "simulated", "measured")
    found = {footprint.activation(use, decode).basis for use in spec.uses}
    return next((basis for basis in order if basis in found), "derived")


def fits_sentence(demand: Demand, budget: Budget) -> str:
    """How near the limit the demand is: `needs 9.80 GiB of 11.20 GiB VRAM and 15.00 GiB of 40.00 GiB RAM`."""
    ram = f"{format_bytes(demand.ram_bytes)} of {format_bytes(budget.ram_bytes)} RAM"
    if budget.vram_bytes is None:
        return f"needs {ram}"
    return f"needs {format_bytes(demand.vram_reserved_bytes)} of {format_bytes(budget.vram_bytes)} VRAM and {ram}"


@dataclass(frozen=True, slots=True)
class _Clock:
    """Turns moments into seconds: operations over the rate reached, bytes over the link."""

    footprint: Footprint
    decode: Sequence[Decode]
    holds: Mapping[str, Hold]
    rates: Rates

    def time(self, moments: Sequence[Moment], steps: int) -> tuple[float, float]:
        """Seconds per denoising step, and per call with this many steps."""
        first = sum(self._seconds(moment) for moment in moments if moment.use.in_loop and not moment.repeat)
        step = sum(self._seconds(moment) for moment in moments if moment.repeat)
        rest = sum(self._seconds(moment) for moment in moments if not moment.use.in_loop)
        left = sum(moment.loaded_bytes - moment.sent_back_bytes for moment in moments)
        freed = left / (self.rates.link_bytes_per_s * 0.5)  # maybe_free_model_hooks at the end of the call
        return step, rest + first + step * (steps - 1) + freed

    def transfer(self, moment: Moment) -> float:
        """Seconds of moving weights for this use, waits between the transfers left out."""
        hold = self.holds[moment.use.component]
        passes = self.footprint.passes(moment.use, self.decode) if hold.moved_in_bytes else 1
        moved = passes * (hold.moved_in_bytes + hold.moved_out_bytes)
        whole = moment.loaded_bytes + moment.sent_back_bytes
        return (moved + whole) / (self.rates.link_bytes_per_s * hold.rate)

    def _seconds(self, moment: Moment) -> float:
        hold = self.holds[moment.use.component]
        compute = self.footprint.flops(moment.use, self.decode) / (self.rates.half_flops_per_s * _EFFICIENCY)
        passes = self.footprint.passes(moment.use, self.decode) if hold.pauses else 1
        moved = self.transfer(moment) + passes * hold.pauses * _PAUSE_SECONDS
        return max(compute, moved) if hold.overlapped else compute + moved
