"""Memory needs and computing costs of each use, from a simulation."""

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
    """The footprint of a pipeline simulated once, with everything resident and default decode settings.

    `decode` simulates the decode with other settings, once each; it returns None if that fails. A use that could not be
    simulated keeps the assumed footprint and its basis. `basis` is `derived` if components were traced one by one.
    """

    spec: PipelineSpec
    workload: Workload
    plain: Simulation
    decode: Callable[[tuple[Decode, ...]], Simulation | None]
    # Reserved over allocated bytes outside of decoding: fragmentation is small there and depends on the placement, so
    # that the chosen candidate is simulated itself in the end.
    slack: float = 1.02
    basis: Basis = "simulated"
    workspace_bytes: int = 0

    @property
    def assumed(self) -> AssumedFootprint:
        """The rules of thumb, for uses that could not be simulated."""
        return AssumedFootprint(spec=self.spec, workload=self.workload)

    @property
    def evaluations(self) -> int:
        """The number of evaluations of the denoiser in a call: some schedulers make more than one a step."""
        return self.plain.call_evaluations or self.assumed.evaluations

    @property
    def denoising_bytes(self) -> int:
        """The largest need of denoising in addition to weights, in bytes."""
        return max((use.need_bytes for use in self.plain.uses if use.phase == "denoise"), default=0)

    def makes(self, use: Use) -> bool:
        """Whether the call makes this use. One that a completed simulated call did not make is not made.

        A call is complete if it came to a denoiser. Denoisers themselves are always counted: only `STEPS` of the steps
        are simulated, and one may come in a later step.
        """
        if use.in_loop or self.basis != "simulated" or self.plain.use(use.phase, use.component) is not None:
            return True
        return not any(item.phase == "denoise" and item.component and item.forwards for item in self.plain.uses)

    def activation(self, use: Use, decode: Sequence[Decode]) -> Estimate:
        """The most bytes needed in addition to weights, by the use or the pipeline's own code in its phase."""
        simulation = self._simulation_for(use, decode)
        found = simulation.use(use.phase, use.component) if simulation else None
        if simulation is None or found is None:
            return self.assumed.activation(use, decode)
        between = self.plain.use(use.phase, "")
        size = max(found.need_bytes, between.need_bytes if between else 0)
        reserved = int(size * self.slack) if simulation is self.plain else max(size, _above_weights(simulation))
        return Estimate(size_bytes=size, reserved_bytes=reserved, basis=self.basis)

    def work(self, use: Use, decode: Sequence[Decode]) -> Work:
        """The work of one such use: the work of its phase, divided by the number of such uses in it."""
        simulation = self._simulation_for(use, decode)
        found = simulation.use(use.phase, use.component) if simulation else None
        assumed = self.assumed.work(use, decode)
        if found is None:
            return assumed
        times = sum((other.phase, other.component) == (use.phase, use.component) for other in self.spec.uses)
        share = 1 / ((self.plain.evaluations or self.plain.steps) if use.in_loop else times)
        tiled = self.spec.component(use.component).role == "vae"  # one call, which loops over the tiles
        return Work(
            flops={kind: flops * share for kind, flops in found.flops_by_kind.items()},
            traffic_bytes=found.traffic_bytes * share,
            launches=found.launches * share,
            forwards=assumed.forwards if tiled else found.forwards * share,
        )

    def _simulation_for(self, use: Use, decode: Sequence[Decode]) -> Simulation | None:
        """The simulation of the decode alone if the use decodes latents, else that of the whole call."""
        decodes = {item.component for item in self.plain.decoded}
        return self.decode(tuple(decode)) if use.phase == "decode" and use.component in decodes else self.plain


def _above_weights(simulation: Simulation) -> int:
    """The bytes reserved in addition to weights in the simulation of one component."""
    return simulation.peak_reserved_bytes - max(phase.weights_bytes for phase in simulation.phases)
