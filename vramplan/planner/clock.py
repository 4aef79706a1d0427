"""Estimate the time of a call: compute, kernel launches, and transfers, hidden behind those or waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vramplan.hardware.types import Rates
from vramplan.pipeline.types import Use
from vramplan.planner.footprint import Estimate, Work
from vramplan.planner.residency import ReplayedUse
from vramplan.strategies.base import Hold

# The share of the memory's peak rate that kernels without matrix products reach. Assumed.
_TRAFFIC_EFFICIENCY = 0.85
# Seconds that Python and the driver take to launch one kernel. Assumed.
_LAUNCH_SECONDS = 6e-6
# Read rate of a disk: an NVMe drive of a laptop on PCIe 3.0. Assumed.
DISK_BYTES_PER_S = 2e9
# The share of hidden time that is paid nevertheless: copies take memory bandwidth, and the link may be slower. Assumed.
_OVERLAP_COST = 0.05
# Seconds to wait for one transfer, in addition to the transfer: a synchronisation and a launch. Assumed.
PAUSE_SECONDS = 1e-4
# Without a profile or a measurement: a PCIe 3.0 x16 card of the 12 GiB class.
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


class UseCost:
    """The cost of a use under any placement: activations, seconds of compute and of kernel launches, forwards."""

    __slots__ = ("activation", "forwards", "kernels", "launches")

    def __init__(self, activation: Estimate, work: Work, rates: Rates) -> None:
        products = work.flops / (rates.half_flops_per_s * rates.reached)
        self.activation = activation
        self.kernels = products + work.traffic_bytes / (rates.memory_bytes_per_s * _TRAFFIC_EFFICIENCY)
        self.launches = work.launches * _LAUNCH_SECONDS
        self.forwards = work.forwards


@dataclass(frozen=True, slots=True)
class Clock:
    """Turns replayed uses into seconds: the longer of compute and kernel launches, and transfers."""

    costs: Mapping[Use, UseCost]
    holds: Mapping[str, Hold]
    rates: Rates

    def time(self, uses: Sequence[ReplayedUse], steps: int) -> tuple[float, float]:
        """Return the seconds of a denoising step, and of a call with this many steps."""
        first = sum(self._seconds(replayed) for replayed in uses if replayed.use.in_loop and not replayed.repeat)
        step = sum(self._seconds(replayed) for replayed in uses if replayed.repeat)
        rest = sum(self._seconds(replayed) for replayed in uses if not replayed.use.in_loop)
        read = sum(hold.read_bytes for hold in self.holds.values()) / DISK_BYTES_PER_S
        left = sum(replayed.loaded_bytes - replayed.sent_back_bytes for replayed in uses)
        freed = left / (self.rates.link_bytes_per_s * 0.5)  # maybe_free_model_hooks at the end of the call
        return step, rest + first + step * (steps - 1) + freed + read

    def transfer(self, replayed: ReplayedUse) -> float:
        """Return the seconds of moving weights for this use, without the waits between transfers."""
        hold, forwards = self.holds[replayed.use.component], self.costs[replayed.use].forwards
        moved = forwards * (hold.moved_in_bytes + hold.moved_out_bytes + hold.waited_bytes)
        whole = replayed.loaded_bytes + replayed.sent_back_bytes
        read = forwards * hold.disk_bytes / DISK_BYTES_PER_S
        return read + (moved + whole) / (self.rates.link_bytes_per_s * hold.rate)

    def bottleneck(self, uses: Sequence[ReplayedUse]) -> Bottleneck:
        """Return the longest part of a step (of a call, for a pipeline without a loop)."""
        step = [replayed for replayed in uses if replayed.repeat] or uses
        seconds: dict[Bottleneck, float] = {
            "compute": sum(self.costs[replayed.use].kernels for replayed in step),
            "transfer": sum(self.transfer(replayed) + self._pauses(replayed) for replayed in step),
            "launch": sum(self.costs[replayed.use].launches for replayed in step),
        }
        return max(seconds, key=lambda name: seconds[name])

    def _seconds(self, replayed: ReplayedUse) -> float:
        hold, cost = self.holds[replayed.use.component], self.costs[replayed.use]
        busy = max(cost.kernels, cost.launches)
        moved = self.transfer(replayed) + self._pauses(replayed)
        if not hold.overlapped:
            return busy + moved
        waited = cost.forwards * hold.waited_bytes / (self.rates.link_bytes_per_s * hold.rate)
        hidden = moved - waited
        return max(busy, hidden) + _OVERLAP_COST * min(busy, hidden) + waited

    def _pauses(self, replayed: ReplayedUse) -> float:
        return self.costs[replayed.use].forwards * self.holds[replayed.use.component].pauses * PAUSE_SECONDS
