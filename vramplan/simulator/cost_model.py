"""Build the planner's cost model: from a simulated call, from traced components, or from rules of thumb."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vramplan.errors import VramplanError
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.types import PipelineSpec
from vramplan.planner.budget import Budgets
from vramplan.planner.candidates import execution_settings
from vramplan.planner.decide import Alternative
from vramplan.planner.decision import Decision
from vramplan.planner.demand import PhaseDemand, weakest_basis
from vramplan.planner.fixed import Fixed
from vramplan.planner.footprint import AssumedFootprint, Footprint
from vramplan.planner.residuals import Basis
from vramplan.simulator.alternatives import Alternatives
from vramplan.simulator.footprint import SimulatedFootprint
from vramplan.simulator.model import SimulatedModel
from vramplan.simulator.types import SimulatedPhase, Simulation
from vramplan.strategies.base import Weights
from vramplan.strategies.settings import grouped
from vramplan.units import format_bytes
from vramplan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """The costs for the planner, from a simulation that can be repeated, or from rules of thumb."""

    footprint: Footprint
    alternatives: tuple[Alternative, ...] = ()
    simulate: Callable[[Decision, int], Simulation] | None = None
    notes: tuple[str, ...] = ()

    def basis(self, spec: PipelineSpec) -> Basis:
        """The weakest basis of the prices. Decodes have their own: each is simulated when it is first priced."""
        uses = [use for use in spec.uses if use.phase != "decode" and self.footprint.makes(use)]
        return weakest_basis(self.footprint.activation(use, ()).basis for use in uses)

    def confirm(self, budgets: Budgets) -> Callable[[Decision], Decision] | None:
        """Return a function that checks a decision by simulating it within its budget; None without a simulation."""
        run = self.simulate
        if run is None or budgets.stored.vram_bytes is None:
            return None

        def confirm(decision: Decision) -> Decision:
            from vramplan.simulator.types import SimulationError

            try:
                capacity = budgets.of(decision.weights).vram_bytes
                return decision if capacity is None else apply_simulation(decision, run(decision, capacity))
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
    """Build the cost model for the stored weights, with an alternative for each of these settings of `weights`.

    Settings of attention and compiling that the user fixed apply to all. Another attention is an alternative if it
    lowers the peak of the denoisers.
    """
    from vramplan.simulator.model import simulated_footprint, traced_footprint
    from vramplan.simulator.types import SimulationError

    model, spec, execution = alternatives.model, alternatives.model.spec, fixed.execution

    def under_weights(plain: Simulation, stored: Footprint) -> tuple[Alternative, ...]:
        return tuple(
            Alternative(
                weights=setting,
                execution=execution,
                spec=alternatives.spec(setting),
                footprint=alternatives.footprint(setting, stored, plain),
            )
            for setting in weights
        )

    if accelerator is None or spec.device_map is not None:
        return _assumed(alternatives, work, weights, fixed)
    try:
        footprint = simulated_footprint(model, work, accelerator, grouped({}, {}, execution))
    except SimulationError as error:
        if not any(use.phase == "denoise" for use in spec.uses):
            raise VramplanError(
                f"{spec.class_name}: no component denoises, and its whole call cannot be simulated: {error}"
            ) from error
        note = f"its components were traced one by one, as the whole call cannot be simulated: {error}"
        traced = traced_footprint(model, work, accelerator)
        notes = (note, *_missing_note(traced, "could be traced"))
        return CostModel(footprint=traced, alternatives=under_weights(traced.plain, traced), notes=notes)
    tried = (
        (item, simulated_footprint(model, work, accelerator, grouped({}, {}, item)))
        for item in execution_settings(spec, fixed, accelerator)
    )
    smaller = tuple(
        Alternative(weights={}, execution=item, spec=spec, footprint=sliced)
        for item, sliced in tried
        if sliced.denoising_bytes < footprint.denoising_bytes
    )
    return CostModel(
        footprint=footprint,
        alternatives=under_weights(footprint.plain, footprint) + smaller,
        simulate=_confirming(model, work, accelerator),
        notes=(*footprint.plain.notes, *_missing_note(footprint, "ran in the simulated call")),
    )


def _assumed(
    alternatives: Alternatives, work: Workload, weights: Sequence[Mapping[str, Weights]], fixed: Fixed
) -> CostModel:
    """Build the cost model from rules of thumb."""
    footprint = AssumedFootprint(spec=alternatives.model.spec, workload=work)
    others = [(setting, alternatives.spec(setting)) for setting in weights]
    return CostModel(
        footprint=footprint,
        alternatives=tuple(
            Alternative(weights=setting, execution=fixed.execution, spec=spec, footprint=replace(footprint, spec=spec))
            for setting, spec in others
        ),
    )


def _confirming(
    model: SimulatedModel, work: Workload, accelerator: Accelerator
) -> Callable[[Decision, int], Simulation]:
    """Return a function that simulates a decision within a capacity in bytes.

    A call that runs out of memory before any VAE runs is simulated once for all decode settings.
    """
    vaes = [component.name for component in model.spec.vaes]
    stopped: dict[Any, Simulation] = {}

    def simulated(decision: Decision, capacity: int) -> Simulation:
        settings = decision.placement, decision.weights, decision.execution
        key = capacity, *(frozenset(by_component.items()) for by_component in settings)
        if key in stopped:
            return stopped[key]
        decodes = [(setting, vaes) for setting in decision.decode]
        found = None
        if not decision.weights:
            found = model.replayed(
                work,
                decision.placement,
                decision.execution,
                decodes,
                accelerator=accelerator,
                capacity_bytes=capacity,
            )
        if found is None:
            found = model.run(work, grouped(*settings), decodes, accelerator=accelerator, capacity_bytes=capacity)
        if _stopped_before_vaes(found, vaes):
            stopped[key] = found
        return found

    return simulated


def _stopped_before_vaes(simulation: Simulation, vaes: Sequence[str]) -> bool:
    """Whether the simulation ran out of memory before any VAE ran."""
    return simulation.stopped_in in ("load", "denoise") and not any(use.component in vaes for use in simulation.uses)


def _missing_note(footprint: SimulatedFootprint, condition: str) -> tuple[str, ...]:
    """A note that names the components without simulated costs, for which rules of thumb are used."""
    names = {
        use.component: None
        for use in footprint.spec.uses
        if not use.optional and footprint.makes(use) and footprint.plain.use(use.phase, use.component) is None
    }
    return (f"not all {condition}: rules of thumb stand in for {', '.join(names)}",) if names else ()


def apply_simulation(decision: Decision, simulation: Simulation) -> Decision:
    """Return the decision with simulated peaks, or rejected with the place and size of the deficit.

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
    return replace(
        priced,
        component=seen.component,
        weights_bytes=seen.weights_bytes,
        activation_bytes=seen.activation_bytes,
        workspace_bytes=seen.workspace_bytes,
        reserved_bytes=seen.peak_allocated_bytes,
    )
