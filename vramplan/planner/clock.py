"""How long a call takes: computing and launching of each use, and bytes over the link, hidden behind them or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vramplan.hardware.rates import Rates
from vramplan.pipeline.types import Use
from vramplan.planner import times
from vramplan.planner.footprint import Estimate, Work
from vramplan.planner.residency import ReplayedUse
from vramplan.strategies.base import Hold

# Where neither a profile nor a measurement says: a PCIe 3.0 x16 card of the 12 GiB class.
DEFAULT_RATES = Rates(
    memory_bytes_per_s=360e9,
    link_bytes_per_s=12e9,
    half_flops_per_s=50e12,
    reached=0.6,
    source="assumed: a mid-range card on PCIe 3.0 x16",
)
DISK_BYTES_PER_S = DEFAULT_RATES.disk_bytes_per_s

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


class UseCost:
    """What a use needs whatever the placement: activations, seconds of compute and of launching, forwards."""

    __slots__ = ("activation", "forwards", "kernels", "launches")

    def __init__(self, activation: Estimate, work: Work, rates: Rates) -> None:
        self.activation = activation
        self.kernels = times.products(work, rates) + times.traffic(work, rates)
        self.launches = times.launches(work, rates)
        self.forwards = work.forwards


@dataclass(frozen=True, slots=True)
class Clock:
    """Turns moments into seconds: computing and launching, whichever is longer, and bytes over the link."""

    needs: Mapping[Use, UseCost]
    holds: Mapping[str, Hold]
    rates: Rates

    def time(self, moments: Sequence[ReplayedUse], evaluations: int) -> tuple[float, float]:
        """Seconds per evaluation of the denoiser, and per call with this many."""
        first = sum(self._seconds(moment) for moment in moments if moment.use.in_loop and not moment.repeat)
        step = sum(self._seconds(moment) for moment in moments if moment.repeat)
        rest = sum(self._seconds(moment) for moment in moments if not moment.use.in_loop)
        read = sum(times.file_reads(hold.read_bytes, self.rates) for hold in self.holds.values())
        return step, rest + first + step * (evaluations - 1) + self._freed(moments) + read

    def transfer(self, moment: ReplayedUse) -> float:
        """Seconds of moving weights for this use, waits between the transfers left out."""
        hold, rates = self.holds[moment.use.component], self.rates
        whole = times.copies_in(hold, moment.loaded_bytes, rates) + times.copies_back(
            hold, moment.sent_back_bytes, rates
        )
        return whole + times.moving(hold, self.needs[moment.use].forwards, rates)

    def bottleneck(self, moments: Sequence[ReplayedUse]) -> Bottleneck:
        """What takes longest in a step (in a call, for a pipeline without a loop)."""
        step = [moment for moment in moments if moment.repeat] or moments
        took: dict[Bottleneck, float] = {
            "compute": sum(self.needs[moment.use].kernels for moment in step),
            "transfer": sum(self.transfer(moment) + self._pauses(moment) for moment in step),
            "launch": sum(self.needs[moment.use].launches for moment in step),
        }
        return max(took, key=lambda name: took[name])

    def _seconds(self, moment: ReplayedUse) -> float:
        hold, need = self.holds[moment.use.component], self.needs[moment.use]
        waited = times.copies_around(need.forwards * hold.waited_bytes, self.rates)
        moved = self.transfer(moment) - waited + self._pauses(moment)
        return times.together(max(need.kernels, need.launches), moved, hold) + waited

    def _freed(self, moments: Sequence[ReplayedUse]) -> float:
        """What is still on the device at the end of the call is sent back (`maybe_free_model_hooks`)."""
        return sum(
            times.copies_back(
                self.holds[moment.use.component], moment.loaded_bytes - moment.sent_back_bytes, self.rates
            )
            for moment in moments
        )

    def _pauses(self, moment: ReplayedUse) -> float:
        return times.hooks(self.holds[moment.use.component], self.needs[moment.use].forwards, self.rates)
