"""Estimate the time of a call: compute, kernel launches, and transfers, hidden behind those or waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from vramplan.hardware.rates import Rates
from vramplan.pipeline.types import Use
from vramplan.planner import times
from vramplan.planner.footprint import Estimate, Work
from vramplan.planner.residency import ReplayedUse
from vramplan.strategies.base import Hold

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
    float32_share=1.0,
    tf32_share=1.0,
    launch_seconds=6e-6,
)

Bottleneck = Literal["compute", "transfer", "launch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UseCost:
    """The cost of a use under any placement: activations, seconds of compute and of kernel launches, forwards."""

    activation: Estimate
    kernels: float
    launches: float
    forwards: float

    @classmethod
    def of(cls, activation: Estimate, work: Work, rates: Rates) -> Self:
        """The cost at these rates."""
        return cls(
            activation=activation,
            kernels=times.products(work, rates) + times.traffic(work, rates),
            launches=times.launches(work, rates),
            forwards=work.forwards,
        )


@dataclass(frozen=True, slots=True)
class Clock:
    """Turns replayed uses into seconds: the longer of compute and kernel launches, and transfers.

    `computing` is a factor on the former. With holds of arrays (`hold_arrays`) seconds are arrays as well.
    """

    costs: Mapping[Use, UseCost]
    holds: Mapping[str, Hold]
    rates: Rates
    computing: float = 1.0

    def time(self, uses: Sequence[ReplayedUse], evaluations: int) -> tuple[float, float]:
        """Return the seconds of one evaluation of the denoiser, and of a call with this many."""
        first = sum(self._seconds(replayed) for replayed in uses if replayed.use.in_loop and not replayed.repeat)
        step = sum(self._seconds(replayed) for replayed in uses if replayed.repeat)
        rest = sum(self._seconds(replayed) for replayed in uses if not replayed.use.in_loop)
        read = sum(times.file_reads(hold.read_bytes, self.rates) for hold in self.holds.values())
        return step, rest + first + step * (evaluations - 1) + self._freed(uses) + read

    def transfer(self, replayed: ReplayedUse) -> float:
        """Return the seconds of moving weights for this use, without the waits between transfers."""
        hold, rates = self.holds[replayed.use.component], self.rates
        whole = times.copies_in(hold, replayed.loaded_bytes, rates)
        whole += times.copies_back(hold, replayed.sent_back_bytes, rates)
        whole += 0.0 if replayed.repeat else times.entering(hold, rates)
        return whole + times.moving(hold, self.costs[replayed.use].forwards, rates)

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
        waited = times.copies_around(cost.forwards * hold.waited_bytes, self.rates)
        moved = self.transfer(replayed) - waited + self._pauses(replayed)
        return times.together(max(cost.kernels, cost.launches) * self.computing, moved, hold) + waited

    def _freed(self, uses: Sequence[ReplayedUse]) -> float:
        """Return the seconds of sending back what is on the device when the call ends (`maybe_free_model_hooks`)."""
        left = (
            (self.holds[replayed.use.component], replayed.loaded_bytes - replayed.sent_back_bytes) for replayed in uses
        )
        return sum(times.copies_back(hold, count, self.rates) for hold, count in left)

    def _pauses(self, replayed: ReplayedUse) -> float:
        return times.hooks(self.holds[replayed.use.component], self.costs[replayed.use].forwards, self.rates)
