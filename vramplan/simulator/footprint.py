"""The planner's figures from a simulation: what each use needs beside weights, and how much it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vramplan.pipeline.types import PipelineSpec, Use
from vramplan.planner.footprint import AssumedFootprint, Estimate, Work
from vramplan.planner.residuals import Basis
from vramplan.simulator.types import Simulation
from vramplan.strategies.base import Decode
from vramplan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedFootprint:
    """Figures of a pipeline that was run once with everything resident and decoded plainly.

    `decode` simulates one way of decoding when it is first asked for, None where it cannot. A use that the call left
    out keeps the assumption, and its basis. `basis` is `derived` where components were traced one by one.
    """

    spec: PipelineSpec
    workload: Workload
    plain: Simulation
    decode: Callable[[tuple[Decode, ...]], Simulation | None]
    # Of components that are not decoding: they fragment little, and differently under each placement, so that the
    # candidate chosen is simulated itself in the end.
    slack: float = 1.02
    basis: Basis = "simulated"
    workspace_bytes: int = 0

    @property
    def assumed(self) -> AssumedFootprint:
        """What is used for what the simulated call left out."""
        return AssumedFootprint(spec=self.spec, workload=self.workload)

    @property
    def denoising_bytes(self) -> int:
        """The most that denoising needs beside weights."""
        return max((use.need_bytes for use in self.plain.uses if use.phase == "denoise"), default=0)

    def activation(self, use: Use, decode: Sequence[Decode]) -> Estimate:
        """The most bytes beside weights while the use runs, and while the pipeline works around it."""
        simulation = self._for(use, decode)
        found = simulation.use(use.phase, use.component) if simulation else None
        if simulation is None or found is None:
            return self.assumed.activation(use, decode)
        between = self.plain.use(use.phase, "")
        size = max(found.need_bytes, between.need_bytes if between else 0)
        reserved = int(size * self.slack) if simulation is self.plain else max(size, _above_weights(simulation))
        return Estimate(size_bytes=size, reserved_bytes=reserved, basis=self.basis)

    def work(self, use: Use, decode: Sequence[Decode]) -> Work:
        """What one such use computes: that of its phase, shared by the times it comes there."""
        simulation = self._for(use, decode)
        found = simulation.use(use.phase, use.component) if simulation else None
        assumed = self.assumed.work(use, decode)
        if found is None:
            return assumed
        times = sum((other.phase, other.component) == (use.phase, use.component) for other in self.spec.uses)
        share = 1 / (self.plain.steps if use.in_loop else times)
        tiled = self.spec.component(use.component).role == "vae"  # entered once, its tiles inside
        return Work(
            flops=found.flops * share,
            traffic_bytes=found.traffic_bytes * share,
            launches=found.launches * share,
            forwards=assumed.forwards if tiled else found.forwards * share,
        )

    def _for(self, use: Use, decode: Sequence[Decode]) -> Simulation | None:
        """The simulation of the decode alone for what decodes, the whole call for everything else."""
        decodes = {item.component for item in self.plain.decoded}
        return self.decode(tuple(decode)) if use.phase == "decode" and use.component in decodes else self.plain


def _above_weights(simulation: Simulation) -> int:
    """What is reserved beside the weights of a component that was simulated by itself."""
    return simulation.peak_reserved_bytes - max(phase.weights_bytes for phase in simulation.phases)
