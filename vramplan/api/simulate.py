"""Simulate a model: under a given plan, under the plan the planner would choose, or all resident."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vramplan.api.machine import choose_machine, known_budget
from vramplan.api.plan import Subject
from vramplan.api.request import PlanRequest
from vramplan.errors import NothingFitsError, UsageError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.describe import describe
from vramplan.pipeline.sources import Live
from vramplan.planfile.file import load_plan
from vramplan.planfile.match import check_match, parse_settings
from vramplan.planfile.types import Plan, load_options
from vramplan.planner.demand import host_demand_of
from vramplan.planner.residency import ReplayedUse, replay
from vramplan.simulator.alternatives import Alternatives
from vramplan.simulator.model import SimulatedModel
from vramplan.simulator.types import SimulatedPhase, Simulation
from vramplan.strategies.base import Decodes, Placed, Placement, Weights
from vramplan.strategies.resident import Resident
from vramplan.workload import Workload, make_workload

_ROOM = 1 << 50


def simulate(
    model: Any,
    plan: Plan | None = None,
    workload: Workload | None = None,
    *,
    capacity_bytes: int | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    timeline: bool = False,
) -> Simulation:
    """Simulate the whole call of `model` with the plan's settings on a device without real memory.

    `model` is a live pipeline (only read), a folder, a repository of the hub or a bundled profile's name. Without a
    plan everything is resident. The default workload is the plan's, or the pipeline's own. `capacity_bytes` is the
    device's memory, unlimited by default. `dtype`, `variant` and `revision` choose what to load if the model is not
    loaded yet. With `timeline` the result keeps the memory over the call, for a plot.

    Raises:
        SimulationError: the call needs data that a pipeline without weights cannot give; the message names the place.
        MismatchError: the plan was made for another pipeline.
        VramplanError: the model or the plan's settings cannot be read.
    """
    described = describe(model, dtype=dtype, variant=variant, revision=revision)
    work = workload or (plan.workload if plan else make_workload(described.defaults, {}))
    return _simulated(SimulatedModel(described.spec), plan, work, capacity_bytes=capacity_bytes, timeline=timeline)


def _simulated(model: SimulatedModel, plan: Plan | None, work: Workload, **options: Any) -> Simulation:
    placed: Placed = []
    decodes: Decodes = []
    accelerator = None
    if plan is not None:
        check_match(model.spec, plan)
        accelerator = plan.machine.accelerator
        placed, decodes = parse_settings(plan, model.spec, accelerator)
    found = model.run(work, placed, decodes, accelerator=accelerator, **options)
    return found if plan is not None and accelerator is None else _with_host(found, model, placed)


def _with_host(found: Simulation, model: SimulatedModel, placed: Placed) -> Simulation:
    """The simulation with what its settings take of the host, as the planner counts it, and the blocks that stay."""
    placement: dict[str, Placement] = {component.name: Resident() for component in model.spec.components}
    placement |= {name: item for item, names in placed if isinstance(item, Placement) for name in names}
    weights = {name: item for item, names in placed if isinstance(item, Weights) for name in names}
    spec = Alternatives(model).spec(weights)
    found = replace(found, **asdict(host_demand_of(spec, placement)))
    uses = replay(spec, {name: setting.hold(spec.component(name), spec) for name, setting in placement.items()})
    return replace(found, phases=tuple(_with_blocks(phase, uses) for phase in found.phases))


def _with_blocks(phase: SimulatedPhase, uses: Sequence[ReplayedUse]) -> SimulatedPhase:
    """The phase with the blocks that stay while the component of its peak runs, or else the first one in it."""
    here = [replayed for replayed in uses if replayed.use.phase == phase.name]
    at_peak = [replayed for replayed in here if replayed.use.component == phase.component]
    blocks = next((replayed.blocks for replayed in (*at_peak, *here)), {})
    return replace(phase, blocks=blocks)


def simulate_plan(path: str | Path, *, timeline: bool = False) -> Simulation:
    """Simulate a plan file's pipeline under its own settings, within its own budget.

    Raises:
        VramplanError: the file is not a plan, or its plan was made from a live pipeline, which is gone.
        MismatchError: the folder or profile has changed since it was planned for.
    """
    plan = load_plan(path)
    source = plan.model.origin
    if isinstance(source, Live):
        raise UsageError(f"{path} was made from a live pipeline: call vramplan.simulate(pipe, plan)")
    limit = plan.machine.budget.vram_bytes
    return simulate(source, plan, capacity_bytes=limit, timeline=timeline, **load_options(plan))


def simulate_model(model: Any, request: PlanRequest, *, timeline: bool = False) -> Simulation:
    """Simulate a model within a machine's memory, under the plan the planner would choose for it.

    Settings fixed by hand are simulated whether they fit or not. If nothing fits, the plan for a machine with enough
    memory is simulated. Without an accelerator the memory is unlimited.
    """
    hardware, accelerator = choose_machine(request.device, vram=request.vram)
    subject = Subject(model, request)
    work = subject.workload()
    limit = None
    if accelerator is not None:
        limit = known_budget(hardware, accelerator, request.amounts).vram_bytes
    try:
        if request.settings or accelerator is None:
            raise NothingFitsError("fixed by hand, or nothing limits it: not for the planner to judge")
        plan = subject.plan(work, hardware, accelerator)
        limit = plan.machine.budget.vram_bytes
    except NothingFitsError:
        unlimited = replace(request, vram=None, ram=None, margin=None, simulate=False)
        roomy = _with_room(hardware, accelerator)
        plan = subject.plan(work, roomy, roomy.accelerators[0], unlimited)
    return _simulated(subject.simulated, plan, work, capacity_bytes=limit, timeline=timeline)


def _with_room(hardware: Hardware, accelerator: Accelerator | None) -> Hardware:
    """The machine with more memory than any plan needs."""
    kind = accelerator or Accelerator(kind="cuda", index=0, name="any", total_bytes=_ROOM, free_bytes=_ROOM)
    card = replace(kind, total_bytes=_ROOM, free_bytes=_ROOM, unified=False)
    return Hardware(accelerators=(card,), host=Host(total_bytes=_ROOM, available_bytes=_ROOM))
