"""The planner's figures from a simulation: what each use needs beside weights, and how much it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vramplan.pipeline.types import PipelineSpec, Use
from vramplan.planner.footprint import AssumedFootprint, Basis, Estimate
from vramplan.simulator.types import Simulation
from vramplan.strategies.base import Decode
from vramplan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedFootprint:
    """Figures of a pipeline that was run once with everything resident and decoded plainly.

    `decode` simulates another way of decoding when it is first asked for. A use that the simulated call left
    out keeps the assumption, and its basis. `basis` is `derived` where components were traced one by one.
    """

    spec: PipelineSpec
    workload: Workload
    plain: Simulation
    decode: Callable[[tuple[Decode, ...]], Simulation]
    # Fragments differ by placement, so that the candidate chosen is simulated itself in the end; until then
    # only rounding is charged.
    slack: float = 1.02
    basis: Basis = "simulated"
    workspace_bytes: int = 0

    @property
    def assumed(self) -> AssumedFootprint:
        """What is used for what the simulated call left out."""
        return AssumedFootprint(spec=self.spec, workload=self.workload)

    def activation(self, use: Use, decode: Sequence[Decode]) -> Estimate:
        """The most bytes beside weights while the use runs, and while the pipeline works around it."""
        simulation = self._for(use, decode)
        found = simulation.use(use.phase, use.component)
        if found is None:
            return self.assumed.activation(use, decode)
        between = simulation.use(use.phase, "")
        return Estimate(size_bytes=max(found.need_bytes, between.need_bytes if between else 0), basis=self.basis)

    def flops(self, use: Use, decode: Sequence[Decode]) -> float:
        """Operations of one such use: those of its phase, shared by the times it comes there."""
        found = self._for(use, decode).use(use.phase, use.component)
        if found is None:
            return self.assumed.flops(use, decode)
        if use.in_loop:
            return found.flops / self.plain.steps
        times = sum((other.phase, other.component) == (use.phase, use.component) for other in self.spec.uses)
        return found.flops / times

    def passes(self, use: Use, decode: Sequence[Decode]) -> int:
        """Tiles and slices, by their number of pixels."""
        return self.assumed.passes(use, decode)

    def _for(self, use: Use, decode: Sequence[Decode]) -> Simulation:
        if use.phase != "decode" or not decode:
            return self.plain
        return self.decode(tuple(decode))
