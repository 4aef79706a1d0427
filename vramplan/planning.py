"""From a model and a machine to a plan: the whole flow, nothing applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vramplan._version import __version__
from vramplan.calibration.learned import versions
from vramplan.errors import NothingFitsError, UsageError, VramplanError
from vramplan.figures import Figures, figures
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
from vramplan.planner.candidates import Refused, weight_settings
from vramplan.planner.decide import Decision, Outcome, decide
from vramplan.planner.demand import Demand
from vramplan.planner.fixed import Fixed, parse_fixed
from vramplan.planner.forms import Forms
from vramplan.planner.order import Prefer
from vramplan.recorded import settings_of
from vramplan.strategies.base import Decode, Quality
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Least:
    """The least VRAM that a candidate needs, what may be used (None on the CPU), and how that candidate decodes."""

    vram_bytes: int
    limit_bytes: int | None
    decode: tuple[Decode, ...]


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
        self._known: dict[Any, Figures] = {}

    def workload(self, given: Mapping[str, Any]) -> Workload:
        """What was given, and the pipeline's own for the rest.

        Raises:
            UsageError: what this pipeline cannot make.
        """
        work = make_workload(self.described.defaults, given)
        if work.num_frames > 1 and not self.spec.video:
            raise UsageError(f"{self.spec.class_name} makes pictures: leave the number of frames out")
        if self.spec.sound and any(given.get(name) is not None for name in ("height", "width")):
            raise UsageError(f"{self.spec.class_name} makes sound: leave height and width out")
        return work

    def plan(
        self, work: Workload, hardware: Hardware, accelerator: Accelerator | None, asked: Asked, *, confirm: bool = True
    ) -> Plan:
        """The plan for this workload and machine, as `plan` makes it; by price alone unless it is to `confirm` it."""
        spec = self.spec
        told, known, budget = self._question(work, hardware, accelerator, asked)
        outcome = decide(
            spec,
            work,
            budget,
            accelerator=accelerator,
            footprint=known.footprint,
            fixed=told,
            allow=asked.allow,
            prefer=asked.prefer,
            confirm=known.confirm(budget) if confirm else None,
            lighter=known.lighter,
        )
        machine = MachineRecord(
            device=accelerator.device if accelerator else "cpu",
            accelerator=accelerator,
            host=hardware.host,
            budget=budget,
            software=versions(),
        )
        notes = (*_notes(spec, accelerator, hardware), *known.notes)
        return _written(spec, work, machine, outcome, notes, asked)

    def least(
        self,
        work: Workload,
        hardware: Hardware,
        accelerator: Accelerator | None,
        asked: Asked,
        decode: tuple[Decode, ...] | None = None,
    ) -> Least | None:
        """What this workload can be brought down to, by price, with whatever `plan` would resort to; decoded so, where
        that is told. None where the RAM does not do for anything."""
        told, known, budget = self._question(work, hardware, accelerator, asked)
        resort: Quality = "lossy" if told.weights else "near_lossless"
        try:
            outcome = decide(
                self.spec,
                work,
                replace(budget, vram_bytes=None),
                accelerator=accelerator,
                footprint=known.footprint,
                fixed=told if decode is None else replace(told, decode=decode),
                allow=asked.allow or resort,
                prefer="memory",
                lighter=known.lighter,
            )
        except NothingFitsError:
            return None
        chosen = outcome.chosen
        return Least(vram_bytes=chosen.demand.vram_reserved_bytes, limit_bytes=budget.vram_bytes, decode=chosen.decode)

    def _question(
        self, work: Workload, hardware: Hardware, accelerator: Accelerator | None, asked: Asked
    ) -> tuple[Fixed, Figures, Budget]:
        """What was fixed by hand, the planner's numbers, and what may be used."""
        spec = self.spec
        refuse_hooked(spec)
        amounts = {"vram": asked.vram, "ram": asked.ram, "margin": asked.margin, **held_bytes(spec)}
        known_budget(hardware, accelerator, amounts)  # what makes no sense is refused before anything is simulated
        told = parse_fixed(self.fixed, spec, accelerator)
        known = self._figures(work, accelerator if self.simulate else None, asked.allow, told)
        basis = known.basis(spec)
        return told, known, known_budget(hardware, accelerator, amounts, basis=basis, pipeline=spec.class_name)

    def _figures(self, work: Workload, accelerator: Accelerator | None, allow: Quality | None, told: Fixed) -> Figures:
        """The planner's numbers, made where no machine with these kernels asked for them before."""
        kernels = None if accelerator is None else tuple(self._forms.source.kernels(accelerator).values())
        key = work, kernels, allow
        if key not in self._known:
            weights = weight_settings(self.spec, told, allow)
            self._known[key] = figures(self._forms, work, accelerator, weights, told)
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
