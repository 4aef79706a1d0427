"""From a model and a machine to a plan: the whole flow, nothing applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vramplan.api.machine import choose_machine, known_budget
from vramplan.common.versions import versions
from vramplan.errors import NothingFitsError, UsageError
from vramplan.hardware.types import Accelerator, Budget, Hardware
from vramplan.pipeline.describe import describe
from vramplan.pipeline.held import held_bytes, refuse_hooked
from vramplan.pipeline.types import PipelineSpec
from vramplan.planfile.record import _written
from vramplan.planfile.types import (
    MachineRecord,
    Plan,
    PlanRequest,
)
from vramplan.planner.candidates import weight_settings
from vramplan.planner.decide import decide
from vramplan.planner.fixed import Fixed, parse_fixed
from vramplan.planner.order import Prefer
from vramplan.simulator.alternatives import Alternatives
from vramplan.simulator.cost_model import CostModel, cost_model
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
    `memory`. `settings` fixes choices by hand, as `{"decode": "plain"}`. `dtype` is the one to load in, `allow_pickle`
    accepts pickled weights. `workload` takes the names of the pipeline's own call: height, width, num_frames,
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
    asked = PlanRequest(allow=allow, prefer=prefer, vram=vram, ram=ram, margin=margin, settings=subject.fixed)
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
        self._forms = Alternatives(Source(model, self.spec))
        self._known: dict[Any, CostModel] = {}

    def workload(self, given: Mapping[str, Any]) -> Workload:
        """What was given, and the pipeline's own for the rest.

        Raises:
            UsageError: what this pipeline cannot make.
        """
        work = make_workload(self.described.defaults, given)
        if work.num_frames > 1 and not self.spec.video:
            raise UsageError(f"{self.spec.class_name} makes pictures: leave `num_frames` out")
        if self.spec.sound and any(given.get(name) is not None for name in ("height", "width")):
            raise UsageError(f"{self.spec.class_name} makes sound: leave `height` and `width` out")
        return work

    def plan(
        self,
        work: Workload,
        hardware: Hardware,
        accelerator: Accelerator | None,
        asked: PlanRequest,
        *,
        confirm: bool = True,
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
        asked: PlanRequest,
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
        self, work: Workload, hardware: Hardware, accelerator: Accelerator | None, asked: PlanRequest
    ) -> tuple[Fixed, CostModel, Budget]:
        """What was fixed by hand, the planner's numbers, and what may be used."""
        spec = self.spec
        refuse_hooked(spec)
        amounts = {"vram": asked.vram, "ram": asked.ram, "margin": asked.margin, **held_bytes(spec)}
        known_budget(hardware, accelerator, amounts)  # what makes no sense is refused before anything is simulated
        told = parse_fixed(self.fixed, spec, accelerator)
        known = self._figures(work, accelerator if self.simulate else None, asked.allow, told)
        basis = known.basis(spec)
        return told, known, known_budget(hardware, accelerator, amounts, basis=basis, pipeline=spec.class_name)

    def _figures(
        self, work: Workload, accelerator: Accelerator | None, allow: Quality | None, told: Fixed
    ) -> CostModel:
        """The planner's numbers, made where no machine with these kernels asked for them before."""
        kernels = None if accelerator is None else tuple(self._forms.source.kernels(accelerator).values())
        key = work, kernels, allow
        if key not in self._known:
            weights = weight_settings(self.spec, told, allow)
            self._known[key] = cost_model(self._forms, work, accelerator, weights, told)
        return self._known[key]


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
