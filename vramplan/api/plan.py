"""Plan for a model and a machine: the whole flow. Nothing is applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack

from vramplan.api.machine import choose_machine, known_budget
from vramplan.api.request import PlanOptions, PlanRequest, make_request, stock_request
from vramplan.common.versions import versions
from vramplan.errors import NothingFitsError, UsageError
from vramplan.hardware.types import Accelerator, Budget, Hardware
from vramplan.pipeline.describe import Model, describe
from vramplan.pipeline.live_memory import held_bytes, refuse_hooked
from vramplan.pipeline.types import PipelineSpec
from vramplan.planfile.record import plan_record
from vramplan.planfile.types import MachineRecord, Plan, StockPlan, all_stock
from vramplan.planner.budget import Budgets
from vramplan.planner.candidates import weight_settings
from vramplan.planner.decide import decide
from vramplan.planner.fixed import Fixed, parse_fixed
from vramplan.planner.residuals import call_kinds
from vramplan.simulator.alternatives import Alternatives
from vramplan.simulator.cost_model import CostModel, cost_model
from vramplan.strategies.base import Decode, Quality
from vramplan.workload import Workload, make_workload


def plan(model: Any, request: PlanRequest | None = None, **options: Unpack[PlanOptions]) -> Plan:
    """Choose the fastest plan that fits `model` on a machine.

    `model` is a live pipeline, a folder, a repository of the hub (`owner/name`; its configurations and safetensors
    headers are read, no weights), or a bundled profile's name. Memory needs come from a simulation of the pipeline,
    and the chosen plan is simulated within the budget before it is returned.

    Args:
        model: the pipeline to plan for.
        request: all options as one value, in place of keyword arguments.
        options: any of these.
            `device`: `cpu`, a torch device of this machine (`cuda:1`), a device profile's name, or a `Hardware`; by
            default this machine's first accelerator.
            `vram`, `ram`, `margin`: amounts (`12GiB`, `-1GiB` for all free memory but 1 GiB, `85%`).
            `allow`: the least faithful setting that may be chosen (`lossless`, `near_lossless`, `lossy`).
            `prefer`: `speed` or `memory`.
            `settings`: choices fixed by hand, by axis and component (`{"placement.vae": "resident"}`).
            `stock`: only settings that diffusers' and accelerate's own calls make, whose code needs no vramplan.
            `dtype`: the one to load in. `variant`: the files to load, as `fp16`. `revision`: of a repository.
            `allow_pickle`: accept pickled weights.
            `simulate`: False uses rules of thumb instead of a simulation, which is immediate.
            All others describe the workload, named as in the pipeline's own call: `height`, `width`, `num_frames`,
            `num_images_per_prompt`, `num_inference_steps`, `guidance_scale`.

    Raises:
        NothingFitsError: no candidate fits.
        UsageError: an argument is not valid.
        VramplanError: the model cannot be read.
    """
    request = make_request(options, request)
    machine = choose_machine(request.device, vram=request.vram)
    subject = Subject(model, request)
    return subject.plan_with_stock(subject.workload(), *machine)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastMemory:
    """The least VRAM that any candidate needs, the VRAM budget (None on the CPU), and that candidate's decode."""

    vram_bytes: int
    limit_bytes: int | None
    decode: tuple[Decode, ...]


class Subject:
    """A model and a request, to be planned for any number of times.

    The model is described once, and simulated once for each workload and set of kernels: nothing else of a machine
    affects a simulation.
    """

    def __init__(self, model: Any, request: PlanRequest, *, described: Model | None = None) -> None:
        """Describe the model, unless its description is given as `described`."""
        from vramplan.simulator.model import SimulatedModel

        self.request = request
        self.described = described or describe(model, **request.loading)
        self.spec = self.described.spec
        self.simulated = SimulatedModel(self.spec)
        self._alternatives = Alternatives(self.simulated)
        self._cost_models: dict[Any, CostModel] = {}

    def workload(self, given: Mapping[str, Any] | None = None) -> Workload:
        """The given workload (by default the request's), completed by the pipeline's own defaults.

        Raises:
            UsageError: this pipeline cannot make it.
        """
        given = self.request.workload if given is None else given
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
        request: PlanRequest | None = None,
        *,
        confirm: bool = True,
    ) -> Plan:
        """Return the plan for this workload and machine; `request` replaces the subject's own.

        Without `confirm` the plan is based on prices alone and is not simulated.
        """
        spec, request = self.spec, request or self.request
        fixed, costs, budgets = self._planner_inputs(work, hardware, accelerator, request)
        outcome = decide(
            spec,
            work,
            budgets.stored,
            quantized_budget=budgets.quantized,
            accelerator=accelerator,
            footprint=costs.footprint,
            fixed=fixed,
            allow=request.allow,
            prefer=request.prefer,
            confirm=costs.confirm(budgets) if confirm else None,
            alternatives=costs.alternatives,
        )
        machine = MachineRecord(
            device=accelerator.device if accelerator else "cpu",
            accelerator=accelerator,
            host=hardware.host,
            budget=budgets.of(outcome.chosen.weights),
            software=versions(),
        )
        notes = (*_notes(spec, accelerator, hardware), *costs.notes)
        return plan_record(spec, work, machine, outcome, notes, request.preferences)

    def plan_with_stock(
        self,
        work: Workload,
        hardware: Hardware,
        accelerator: Accelerator | None,
        request: PlanRequest | None = None,
    ) -> Plan:
        """Return the plan and in it, unless it is stock itself, the one for the same request with stock settings."""
        request = request or self.request
        plan = self.plan(work, hardware, accelerator, request)
        if all_stock(plan.settings):
            return plan
        try:
            stock = self.plan(work, hardware, accelerator, stock_request(request))
        except (NothingFitsError, UsageError) as error:
            return replace(plan, stock=StockPlan(reason=str(error)))
        found = StockPlan(
            reason=stock.reason, settings=stock.settings, quality=stock.quality, projected=stock.projected
        )
        return replace(plan, stock=found)

    def least_memory(
        self,
        work: Workload,
        hardware: Hardware,
        accelerator: Accelerator | None,
        request: PlanRequest | None = None,
        *,
        decode: tuple[Decode, ...] | None = None,
    ) -> LeastMemory | None:
        """Return the least memory that this workload needs, by price, with every setting `plan` could fall back to.

        `decode` fixes the decode settings. None if RAM is too small for any candidate.
        """
        request = request or self.request
        fixed, costs, budgets = self._planner_inputs(work, hardware, accelerator, request)
        fallback: Quality = "lossy" if fixed.weights else "near_lossless"
        try:
            outcome = decide(
                self.spec,
                work,
                replace(budgets.stored, vram_bytes=None),
                accelerator=accelerator,
                footprint=costs.footprint,
                fixed=fixed if decode is None else replace(fixed, decode=decode),
                allow=request.allow or fallback,
                prefer="memory",
                alternatives=costs.alternatives,
            )
        except NothingFitsError:
            return None
        demand, decode = outcome.chosen.demand, outcome.chosen.decode
        limit = budgets.of(outcome.chosen.weights).vram_bytes
        return LeastMemory(vram_bytes=demand.vram_reserved_bytes, limit_bytes=limit, decode=decode)

    def _planner_inputs(
        self, work: Workload, hardware: Hardware, accelerator: Accelerator | None, request: PlanRequest
    ) -> tuple[Fixed, CostModel, Budgets]:
        """The settings fixed by hand, the cost model, and the budgets."""
        spec = self.spec
        refuse_hooked(spec)
        amounts = {**request.amounts, **held_bytes(spec)}
        known_budget(hardware, accelerator, amounts)  # refuse an impossible amount before anything is simulated
        fixed = parse_fixed(request.settings, spec, accelerator, stock=request.stock)
        costs = self._cost_model(work, accelerator if request.simulate else None, request, fixed)
        packed = any(component.quantized for component in spec.components)

        def budget(changed: bool) -> Budget:
            kinds = call_kinds(work, quantized=packed or changed)
            basis, pipeline = costs.basis(spec), spec.class_name
            return known_budget(hardware, accelerator, amounts, basis=basis, pipeline=pipeline, kinds=kinds)

        stored = budget(changed=False)
        try:
            quantized = budget(changed=True)
        except NothingFitsError:  # the wider margin is all of it, which rules out changed weights alone
            quantized = replace(stored, vram_bytes=0)
        return fixed, costs, Budgets(stored=stored, quantized=quantized)

    def _cost_model(
        self, work: Workload, accelerator: Accelerator | None, request: PlanRequest, fixed: Fixed
    ) -> CostModel:
        """The cost model for these kernels, built once."""
        kernels = None if accelerator is None else tuple(self.simulated.kernels(accelerator).values())
        key = work, kernels, request.allow, tuple(request.settings.items())
        if key not in self._cost_models:
            weights = weight_settings(self.spec, fixed, request.allow)
            self._cost_models[key] = cost_model(self._alternatives, work, accelerator, weights, fixed)
        return self._cost_models[key]


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
