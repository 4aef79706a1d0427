"""Build the planner's cost model: from a simulated call, from traced components, or from rules of thumb."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vramplan.errors import VramplanError
from vramplan.hardware.types import Accelerator, Budget
from vramplan.pipeline.types import PipelineSpec
from vramplan.planner.candidates import execution_settings
from vramplan.planner.decide import Alternative, Decision
from vramplan.planner.demand import PhaseDemand, weakest_basis
from vramplan.planner.fixed import Fixed
from vramplan.planner.footprint import AssumedFootprint, Footprint
from vramplan.planner.residuals import Basis
from vramplan.simulator.alternatives import Alternatives
from vramplan.simulator.types import SimulatedPhase, Simulation
from vramplan.strategies.base import Weights
from vramplan.strategies.settings import grouped
from vramplan.units import format_bytes
from vramplan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """The planner's costs: from a simulation that can be run again, or from rules of thumb."""

    footprint: Footprint
    lighter: tuple[Alternative, ...] = ()
    simulate: Callable[[Decision, int], Simulation] | None = None
    notes: tuple[str, ...] = ()

    def basis(self, spec: PipelineSpec) -> Basis:
        """The weakest basis of the prices. Decodes have their own: each is simulated when it is first priced."""
        uses = [use for use in spec.uses if use.phase != "decode"]
        return weakest_basis(self.footprint.activation(use, ()).basis for use in uses)

    def confirm(self, budget: Budget) -> Callable[[Decision], Decision] | None:
        """A function that checks a decision by simulating it within this budget; None without a simulation."""
        run, capacity = self.simulate, budget.vram_bytes
        if run is None or capacity is None:
            return None

        def confirm(decision: Decision) -> Decision:
            from vramplan.simulator.run import SimulationError

            try:
                return apply_simulation(decision, run(decision, capacity))
            except SimulationError as error:  # everything resident ran, so these settings are the cause
                return replace(decision, verdict="rejected", reason=f"does not run: {error}")

        return confirm


def cost_model(
    alternatives: Alternatives,
    work: Workload,
    accelerator: Accelerator | None,
    weights: Sequence[Mapping[str, Weights]],
    fixed: Fixed,
) -> CostModel:
    """Build the cost model of the stored weights, and of each of these weights settings.

    Attention and compile settings in `fixed` apply to all of them. An attention setting that the user did not fix is
    one more alternative, if it lowers the memory that denoising needs.
    """
    from vramplan.simulator.run import SimulationError
    from vramplan.simulator.source import simulated_footprint, traced_footprint

    source, spec, execution = alternatives.source, alternatives.source.spec, fixed.execution
    light = [(setting, alternatives.spec(setting)) for setting in weights]

    def lighter(needs: Callable[[Mapping[str, Weights], PipelineSpec], Footprint]) -> tuple[Alternative, ...]:
        return tuple(
            Alternative(weights=setting, execution=execution, spec=other, footprint=needs(setting, other))
            for setting, other in light
        )

    if accelerator is None or spec.device_map is not None:
        assumed = AssumedFootprint(spec=spec, workload=work)
        return CostModel(footprint=assumed, lighter=lighter(lambda _, other: replace(assumed, spec=other)))
    try:
        footprint = simulated_footprint(source, work, accelerator, grouped({}, {}, execution))
    except SimulationError as error:
        if not any(use.phase == "denoise" for use in spec.uses):
            raise VramplanError(
                f"{spec.class_name}: no component denoises, and its whole call cannot be simulated: {error}"
            ) from error
        note = f"its components were traced one by one, as the whole call cannot be simulated: {error}"
        traced = traced_footprint(source, work, accelerator)
        others = lighter(lambda setting, _: alternatives.footprint(setting, traced, traced.plain))
        return CostModel(
            footprint=traced, lighter=others, notes=(note, *_missing_note(spec, traced.plain, "could be traced"))
        )
    every = lighter(lambda setting, _: alternatives.footprint(setting, footprint, footprint.plain))
    tried = (
        (item, simulated_footprint(source, work, accelerator, grouped({}, {}, item)))
        for item in execution_settings(spec, fixed, accelerator)
    )
    every += tuple(
        Alternative(weights={}, execution=item, spec=spec, footprint=sliced)
        for item, sliced in tried
        if sliced.denoising_bytes < footprint.denoising_bytes
    )

    vaes = [component.name for component in spec.vaes]
    stopped: dict[Any, Simulation] = {}

    def simulate(decision: Decision, capacity: int) -> Simulation:
        settings = decision.placement, decision.weights, decision.execution
        key = capacity, *(frozenset(part.items()) for part in settings)
        if key in stopped:  # the decode settings make no difference then
            return stopped[key]
        decodes = [(setting, vaes) for setting in decision.decode]
        found = source.run(work, grouped(*settings), decodes, accelerator=accelerator, capacity_bytes=capacity)
        if _stopped_before_vaes(found, vaes):
            stopped[key] = found
        return found

    notes = (*footprint.plain.notes, *_missing_note(spec, footprint.plain, "ran in the simulated call"))
    return CostModel(footprint=footprint, lighter=every, simulate=simulate, notes=notes)


def _stopped_before_vaes(simulation: Simulation, vaes: Sequence[str]) -> bool:
    """Whether the simulation ran out of memory before any VAE ran."""
    return simulation.stopped_in in ("load", "denoise") and not any(use.component in vaes for use in simulation.uses)


def _missing_note(spec: PipelineSpec, simulation: Simulation, condition: str) -> tuple[str, ...]:
    """A note that names the components without simulated costs, for which rules of thumb are used."""
    names = {
        use.component: None
        for use in spec.uses
        if not use.optional and simulation.use(use.phase, use.component) is None
    }
    return (f"not all {condition}: rules of thumb stand in for {', '.join(names)}",) if names else ()


def apply_simulation(decision: Decision, simulation: Simulation) -> Decision:
    """The decision with the peaks of its own simulation, or rejected, with where and by how much it does not fit.

    A phase that the simulated call did not reach keeps its price.
    """
    if simulation.stopped is not None:
        short = simulation.short_bytes
        lack = f"short by at least {format_bytes(short)}" if short else "as much is free, but in pieces too small"
        reason = f"{simulation.stopped}: {lack}"
        return replace(decision, verdict="rejected", reason=reason, deficit_bytes=short or simulation.over_bytes)
    found = {phase.name: phase for phase in simulation.phases}
    phases, unseen = [], []
    for priced in decision.demand.phases:
        if (seen := found.get(priced.name)) is None:
            unseen.append(priced)
        phases.append(priced if seen is None else _simulated_phase(priced, seen))
    demand = replace(
        decision.demand,
        vram_allocated_bytes=max([simulation.peak_allocated_bytes, *(phase.allocated_bytes for phase in unseen)]),
        vram_reserved_bytes=max([simulation.peak_reserved_bytes, *(phase.reserved_bytes for phase in unseen)]),
        phases=tuple(phases),
    )
    return replace(decision, demand=demand)


def _simulated_phase(priced: PhaseDemand, seen: SimulatedPhase) -> PhaseDemand:
    return PhaseDemand(
        name=priced.name,
        component=seen.component,
        on_device=priced.on_device,
        weights_bytes=seen.weights_bytes,
        activation_bytes=seen.activation_bytes,
        workspace_bytes=seen.workspace_bytes,
        reserved_bytes=seen.peak_allocated_bytes,
    )
