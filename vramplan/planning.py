"""From a model and a machine to a plan: the whole flow, nothing applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vramplan._version import __version__
from vramplan.calibration.learned import versions
from vramplan.errors import UsageError, VramplanError
from vramplan.hardware.types import Accelerator, Budget, Hardware
from vramplan.machine import choose_machine, known_budget
from vramplan.models import describe
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.planfile import (
    SCHEMA_VERSION,
    Asked,
    ComponentRecord,
    Considered,
    MachineRecord,
    ModelRecord,
    Plan,
    Projected,
    fingerprint,
)
from vramplan.planner.candidates import Fixed, Refused, execution_settings, parse_fixed, weight_settings
from vramplan.planner.decide import Decision, Lighter, Outcome, Prefer, decide
from vramplan.planner.demand import Demand, PhaseDemand, weakest_basis
from vramplan.planner.footprint import AssumedFootprint, Footprint
from vramplan.planner.forms import Forms
from vramplan.recorded import settings_of
from vramplan.residuals import Basis
from vramplan.simulator.types import Simulation
from vramplan.strategies.base import Quality, Weights
from vramplan.strategies.settings import grouped
from vramplan.units import format_bytes
from vramplan.workload import Workload, make_workload


def plan(
    model: Any,
    *,
    device: str | Hardware | None = None,
    vram: str | None = None,
    ram: str | None = None,
    margin: str | None = None,
    allow: Quality | None = None,
    prefer: Prefer = "speed",
    dtype: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    settings: Mapping[str, str | Sequence[str]] | None = None,
    allow_pickle: bool = False,
    simulate: bool = True,
    **workload: Any,
) -> Plan:
    """The fastest plan that fits `model` on a machine.

    `model` is a live pipeline, a folder, a repository of the hub (`owner/name`, at a `revision`; its configurations
    and safetensors headers are read, no weight), or a bundled profile's name. `variant` is the one of its files to
    load, as `fp16`. `device` is `cpu`, a torch device of this machine (`cuda:1`), a device profile's name, or a
    `Hardware`; the first accelerator of this machine when left out. `vram`, `ram` and `margin` are amounts (`12GiB`,
    `-1GiB`, `85%`). `allow` is the least faithful setting that may be chosen, `prefer` what to choose by: `speed` or
    `memory`. `settings` fixes choices by hand as `--set` does. `dtype` is the one to load in, `allow_pickle` accepts
    pickled weights. `workload` takes the names of the pipeline's own call: height, width, num_frames,
    num_images_per_prompt, num_inference_steps, guidance_scale.

    What running needs is read off a simulation of the pipeline, and the chosen plan is simulated within the
    budget before it is returned; `simulate=False` takes rules of thumb instead, at once.

    Raises:
        NothingFitsError: no candidate fits.
        UsageError: an argument that makes no sense.
        VramplanError: the model cannot be read.
    """
    subject = Subject(
        model,
        dtype=dtype,
        variant=variant,
        revision=revision,
        allow_pickle=allow_pickle,
        settings=settings,
        simulate=simulate,
    )
    hardware, accelerator = choose_machine(device, vram=vram)
    asked = Asked(allow=allow, prefer=prefer, vram=vram, ram=ram, margin=margin, settings=subject.fixed)
    return subject.plan(subject.workload(workload), hardware, accelerator, asked)


class Subject:
    """A model that is planned for again and again: it is described once, and simulated once for each workload and
    kind of kernels, as a simulation depends on nothing else of a machine."""

    def __init__(
        self,
        model: Any,
        *,
        settings: Mapping[str, str | Sequence[str]] | None = None,
        simulate: bool = True,
        **loading: Any,
    ) -> None:
        """`loading` is what `describe` takes beside the model."""
        from vramplan.simulator.source import Source

        self.described = describe(model, **loading)
        self.spec = self.described.spec
        self.fixed = {
            key: (value,) if isinstance(value, str) else tuple(value) for key, value in (settings or {}).items()
        }
        self.simulate = simulate
        self._forms = Forms(Source(model, self.spec))
        self._known: dict[Any, _Figures] = {}

    def workload(self, given: Mapping[str, Any]) -> Workload:
        """What was given, and the pipeline's own for the rest.

        Raises:
            UsageError: what this pipeline cannot make.
        """
        work = make_workload(self.described.defaults, given)
        if work.num_frames > 1 and not self.spec.video:
            raise UsageError(f"{self.spec.class_name} makes pictures: leave the number of frames out")
        return work

    def plan(
        self, work: Workload, hardware: Hardware, accelerator: Accelerator | None, asked: Asked, *, confirm: bool = True
    ) -> Plan:
        """The plan for this workload and machine, as `plan` makes it; by price alone unless it is to `confirm` it."""
        spec = self.spec
        refuse_hooked(spec)
        amounts = {"vram": asked.vram, "ram": asked.ram, "margin": asked.margin, **held_bytes(spec)}
        known_budget(hardware, accelerator, amounts)  # what makes no sense is refused before anything is simulated
        told = parse_fixed(self.fixed, spec, accelerator)
        figures = self._figures(work, accelerator if self.simulate else None, asked.allow, told)
        basis = figures.basis(spec)
        budget = known_budget(hardware, accelerator, amounts, basis=basis, pipeline=spec.class_name)
        outcome = decide(
            spec,
            work,
            budget,
            accelerator=accelerator,
            footprint=figures.footprint,
            fixed=told,
            allow=asked.allow,
            prefer=asked.prefer,
            confirm=figures.confirm(budget) if confirm else None,
            lighter=figures.lighter,
        )
        machine = MachineRecord(
            device=accelerator.device if accelerator else "cpu",
            accelerator=accelerator,
            host=hardware.host,
            budget=budget,
            software=versions(),
        )
        notes = (*_notes(spec, accelerator, hardware), *figures.notes)
        return _written(spec, work, machine, outcome, notes, asked)

    def _figures(self, work: Workload, accelerator: Accelerator | None, allow: Quality | None, told: Fixed) -> _Figures:
        """The planner's numbers, made where no machine with these kernels asked for them before."""
        from vramplan.simulator.source import kernels_of

        kernels = None if accelerator is None else tuple(kernels_of(accelerator).values())
        key = work, kernels, allow
        if key not in self._known:
            weights = weight_settings(self.spec, told, allow)
            self._known[key] = _figures(self._forms, work, accelerator, weights, told)
        return self._known[key]


def _written(
    spec: PipelineSpec,
    work: Workload,
    machine: MachineRecord,
    outcome: Outcome,
    notes: tuple[str, ...],
    asked: Asked,
) -> Plan:
    """The outcome as a plan."""
    chosen = outcome.chosen
    unknown = [setting.unknown for settings in chosen.execution.values() for setting in settings]
    return Plan(
        schema_version=SCHEMA_VERSION,
        vramplan_version=__version__,
        model=_model_record(spec),
        workload=work,
        machine=machine,
        asked=asked,
        settings=settings_of(chosen),
        quality=chosen.quality,
        projected=chosen.demand,
        reason=chosen.reason,
        notes=tuple(dict.fromkeys((*notes, *filter(None, unknown)))),
        refused=_once(outcome.refused),
        candidates=tuple(_considered(decision) for decision in outcome.decisions),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    """Where the planner's numbers come from: a simulation that can be run again, or rules of thumb."""

    footprint: Footprint
    lighter: tuple[Lighter, ...] = ()
    simulated: Callable[[Decision, int], Simulation] | None = None
    notes: tuple[str, ...] = ()

    def basis(self, spec: PipelineSpec) -> Basis:
        """What prices will rest on. Decodes have a basis each: they are simulated when they are first asked for."""
        uses = [use for use in spec.uses if use.phase != "decode"]
        return weakest_basis(self.footprint.activation(use, ()).basis for use in uses)

    def confirm(self, budget: Budget) -> Callable[[Decision], Decision] | None:
        """What has the last word on a decision within this budget; nothing without a simulation."""
        run, capacity = self.simulated, budget.vram_bytes
        if run is None or capacity is None:
            return None

        def confirm(decision: Decision) -> Decision:
            from vramplan.simulator.run import SimulationError

            try:
                return confirmed(decision, run(decision, capacity))
            except SimulationError as error:  # with everything resident it ran: these settings are what stops it
                return replace(decision, verdict="rejected", reason=f"does not run: {error}")

        return confirm


def _figures(
    forms: Forms,
    work: Workload,
    accelerator: Accelerator | None,
    weights: Sequence[Mapping[str, Weights]],
    told: Fixed,
) -> _Figures:
    """What the planner counts with, for the weights as they are stored and with each of these settings.

    What was told of attention and compiling goes with each. Attention that nobody asked for is one more form of the
    pipeline, where it lowers what a denoiser needs.
    """
    from vramplan.simulator.run import SimulationError
    from vramplan.simulator.source import simulated_footprint, traced_footprint

    source, spec, execution = forms.source, forms.source.spec, told.execution
    light = [(setting, forms.spec(setting)) for setting in weights]
    if accelerator is None or spec.device_map is not None:
        assumed = AssumedFootprint(spec=spec, workload=work)
        return _Figures(
            footprint=assumed,
            lighter=tuple(
                Lighter(weights=setting, execution=execution, spec=other, footprint=replace(assumed, spec=other))
                for setting, other in light
            ),
        )
    try:
        footprint = simulated_footprint(source, work, accelerator, grouped({}, {}, execution))
    except SimulationError as error:
        note = f"its components were traced one by one, as the whole call cannot be simulated: {error}"
        traced = traced_footprint(source, work, accelerator)
        others = tuple(
            Lighter(
                weights=setting,
                execution=execution,
                spec=other,
                footprint=forms.footprint(setting, traced, traced.plain),
            )
            for setting, other in light
        )
        return _Figures(footprint=traced, lighter=others, notes=(note,))
    lighter = tuple(
        Lighter(
            weights=setting,
            execution=execution,
            spec=other,
            footprint=forms.footprint(setting, footprint, footprint.plain),
        )
        for setting, other in light
    )
    tried = (
        (item, simulated_footprint(source, work, accelerator, grouped({}, {}, item)))
        for item in execution_settings(spec, told, accelerator)
    )
    lighter += tuple(
        Lighter(weights={}, execution=item, spec=spec, footprint=sliced)
        for item, sliced in tried
        if sliced.denoising_bytes < footprint.denoising_bytes
    )

    def simulated(decision: Decision, capacity: int) -> Simulation:
        vaes = [component.name for component in spec.vaes]
        decodes = [(setting, vaes) for setting in decision.decode]
        placed = grouped(decision.placement, decision.weights, decision.execution)
        return source.run(work, placed, decodes, accelerator=accelerator, capacity_bytes=capacity)

    return _Figures(footprint=footprint, lighter=lighter, simulated=simulated, notes=footprint.plain.notes)


def confirmed(decision: Decision, simulation: Simulation) -> Decision:
    """The decision with what its own simulation found: its peaks, or where and by how much it does not fit."""
    if simulation.stopped is not None:
        reason = f"{simulation.stopped}: short by at least {format_bytes(simulation.short_bytes)}"
        return replace(decision, verdict="rejected", reason=reason, deficit_bytes=simulation.short_bytes)
    on_device = {phase.name: phase.on_device for phase in decision.demand.phases}
    phases = tuple(
        PhaseDemand(
            name=phase.name,
            component=phase.component,
            on_device=on_device[phase.name],
            weights_bytes=phase.weights_bytes,
            activation_bytes=phase.activation_bytes,
            workspace_bytes=phase.workspace_bytes,
            reserved_bytes=phase.peak_allocated_bytes,
        )
        for phase in simulation.phases
        if phase.name != "load" and phase.name in on_device
    )
    demand = replace(
        decision.demand,
        vram_allocated_bytes=simulation.peak_allocated_bytes,
        vram_reserved_bytes=simulation.peak_reserved_bytes,
        phases=phases,
    )
    return replace(decision, demand=demand)


def refuse_hooked(spec: PipelineSpec) -> None:
    """A pipeline somebody already offloaded is left alone: hooks on hooks go wrong silently."""
    for component in spec.components:
        offloads = [hook for hook in component.hooks if hook != "layerwise_casting"]
        if offloads:
            raise VramplanError(
                f"{component.name} already has {offloads[0].replace('_', ' ')}, set outside vramplan: load the "
                "pipeline anew, or take it off first (pipe.remove_all_hooks() for model and sequential offload); if it "
                "is shared with another pipeline, undo the plan there (vramplan.applied_to(other).undo())"
            )


def held_bytes(spec: PipelineSpec) -> dict[str, int]:
    """What a live pipeline's own weights take now of VRAM and RAM, as `make_budget` names it: they are what is to be
    placed, so that they do not count as used."""
    return {
        "held_vram_bytes": _held(spec.components, on_host=False),
        "held_ram_bytes": _held(spec.components, on_host=True),
    }


def _held(components: Sequence[Component], *, on_host: bool) -> int:
    return sum(
        component.weight_bytes
        for component in components
        if component.device not in (None, "meta") and (component.device == "cpu") == on_host
    )


def _model_record(spec: PipelineSpec) -> ModelRecord:
    return ModelRecord(
        source=spec.source,
        class_name=spec.class_name,
        fingerprint=fingerprint(spec),
        components=tuple(
            ComponentRecord(
                name=component.name,
                class_name=component.class_name,
                library=component.library,
                dtype=component.dtype,
                weight_bytes=component.weight_bytes,
                variant=component.variant,
            )
            for component in spec.components
        ),
    )


def _considered(decision: Decision) -> Considered:
    return Considered(
        settings=settings_of(decision),
        verdict=decision.verdict,
        reason=decision.reason,
        projected=projected(decision.demand),
    )


def projected(demand: Demand) -> Projected:
    """A demand without its phases."""
    return Projected(
        vram_allocated_bytes=demand.vram_allocated_bytes,
        vram_reserved_bytes=demand.vram_reserved_bytes,
        ram_bytes=demand.ram_bytes,
        pinned_bytes=demand.pinned_bytes,
        disk_bytes=demand.disk_bytes,
        seconds_per_step=demand.seconds_per_step,
        seconds_per_call=demand.seconds_per_call,
        bottleneck=demand.bottleneck,
        basis=demand.basis,
    )


def _notes(spec: PipelineSpec, accelerator: Accelerator | None, hardware: Hardware) -> tuple[str, ...]:
    notes = [*spec.notes, *hardware.notes]
    if accelerator is None:
        notes.append("no accelerator is used: this plan runs everything on the CPU, which is slow")
    outside = [c.name for c in spec.components if c.name not in (spec.sequence or ()) and spec.sequence]
    if outside:
        notes.append(
            f"not in the offload sequence of {spec.class_name}: {', '.join(outside)}; model offload keeps "
            "them on the device, and they are charged so"
        )
    return tuple(notes)


def _once(refused: Sequence[Refused]) -> tuple[Refused, ...]:
    """Each reason once: the same refusal for every number of blocks tells nobody anything."""
    return tuple({item.reason: item for item in reversed(refused)}.values())[::-1]
