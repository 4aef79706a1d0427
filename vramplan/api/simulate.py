"""Simulate a model: under a plan, under the plan that would be made for it, or all resident."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vramplan.api.machine import choose_machine, known_budget
from vramplan.api.plan import plan as make_plan
from vramplan.errors import NothingFitsError, UsageError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.describe import describe
from vramplan.planfile.file import load_plan
from vramplan.planfile.match import check_match, parse_settings
from vramplan.planfile.types import Plan, load_options
from vramplan.simulator.source import Source
from vramplan.simulator.types import Simulation
from vramplan.strategies.base import Decodes, Placed
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
    """Run the whole call of `model` with the plan's settings on the simulated device.

    `model` is a live pipeline (only read), a folder, a repository of the hub or a bundled profile's name. Without
    a plan everything is resident; without a workload the plan's, or the pipeline's own, is taken.
    `capacity_bytes` limits the device; nothing does when it is left out. `dtype`, `variant` and `revision` are those to
    load, for a model that is not loaded yet. With `timeline` the memory over the call is kept, for a picture of it.

    Raises:
        SimulationError: the call needs something a hollow pipeline cannot give; the message names where.
        MismatchError: the plan was made for another pipeline.
        VramplanError: the model cannot be read, or the plan's settings cannot be.
    """
    described = describe(model, dtype=dtype, variant=variant, revision=revision)
    spec = described.spec
    work = workload or (plan.workload if plan else make_workload(described.defaults, {}))
    placed: Placed = []
    decodes: Decodes = []
    accelerator = None
    if plan is not None:
        check_match(spec, plan)
        accelerator = plan.machine.accelerator
        placed, decodes = parse_settings(plan, spec, accelerator)
    source = Source(model, spec)
    return source.run(work, placed, decodes, accelerator=accelerator, capacity_bytes=capacity_bytes, timeline=timeline)


def simulate_plan(path: str | Path, *, timeline: bool = False) -> Simulation:
    """A plan file's pipeline under its own settings, within its own budget.

    Raises:
        VramplanError: not a plan, or one made from a live pipeline, which is gone.
        MismatchError: the folder or profile is no longer what was planned for.
    """
    plan = load_plan(path)
    if plan.model.source == "live":
        raise UsageError(f"{path} was made from a live pipeline: call vramplan.simulate(pipe, plan)")
    return simulate(
        plan.model.source.removeprefix("profile:"),
        plan,
        capacity_bytes=plan.machine.budget.vram_bytes,
        timeline=timeline,
        **load_options(plan),
    )


def simulate_model(
    model: str,
    *,
    device: str | None = None,
    vram: str | None = None,
    ram: str | None = None,
    margin: str | None = None,
    settings: Mapping[str, str | Sequence[str]] | None = None,
    timeline: bool = False,
    **options: Any,
) -> Simulation:
    """A model within a machine's memory, under the plan that would be made for it.

    What `settings` fixes is simulated whether it fits or not, and so is a model for which nothing fits: as it
    would run with room enough. `options` are those of `vramplan.plan`. Without an accelerator nothing is limited.
    """
    hardware, accelerator = choose_machine(device, vram=vram)
    stored: dict[str, Any] = {name: options.get(name) for name in ("dtype", "variant", "revision")}
    roomy = _with_room(hardware, accelerator)
    if accelerator is None:
        made = make_plan(model, device=roomy, settings=settings, simulate=False, **options)
        return simulate(model, made, timeline=timeline, **stored)
    budget = known_budget(hardware, accelerator, {"vram": vram, "ram": ram, "margin": margin})
    try:
        if settings:
            raise NothingFitsError("fixed by hand: not for the planner to judge")
        plan = make_plan(model, device=device, vram=vram, ram=ram, margin=margin, **options)
    except NothingFitsError:
        plan = make_plan(model, device=roomy, settings=settings, simulate=False, **options)
    return simulate(model, plan, capacity_bytes=budget.vram_bytes, timeline=timeline, **stored)


def _with_room(hardware: Hardware, accelerator: Accelerator | None) -> Hardware:
    """The machine with more memory than any plan needs."""
    kind = accelerator or Accelerator(kind="cuda", index=0, name="any", total_bytes=_ROOM, free_bytes=_ROOM)
    card = replace(kind, total_bytes=_ROOM, free_bytes=_ROOM, unified=False)
    return Hardware(accelerators=(card,), host=Host(total_bytes=_ROOM, available_bytes=_ROOM))
