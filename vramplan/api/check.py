"""Compare a plan with the machine now; where it no longer holds, make a new plan for the same request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from vramplan.api.machine import choose_machine, known_budget
from vramplan.api.plan import Subject
from vramplan.api.request import request_of
from vramplan.common.progress import Say
from vramplan.common.versions import versions
from vramplan.errors import MismatchError, NothingFitsError, UsageError
from vramplan.hardware.detect import detect
from vramplan.hardware.types import Accelerator, Budget, Hardware
from vramplan.pipeline.describe import Model, describe
from vramplan.pipeline.live_memory import held_bytes
from vramplan.pipeline.sources import Folder
from vramplan.pipeline.types import PipelineSpec
from vramplan.planfile.match import check_match, parse_settings
from vramplan.planfile.types import Plan, load_options, settings_text
from vramplan.planner.demand import fits_sentence
from vramplan.units import format_bytes

# Free memory always varies; a decrease by at most this share of the planned amount is not reported. Assumed.
_NOTICED = 0.05


DriftKind = Literal[
    "holds", "no device", "another device", "no memory", "short", "another pipeline", "changed pipeline"
]
# Kinds whose sentences end in the advice to plan again.
_ADVISED: frozenset[DriftKind] = frozenset({"another device", "short", "changed pipeline"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """The difference between a plan and the machine now. `sentence` says how the plan fits, `broken` why it cannot be
    applied any more (None if it can), `kind` the same as a value; `changes` are other differences, each with both
    numbers."""

    sentence: str
    kind: DriftKind = "holds"
    broken: str | None = None
    changes: tuple[str, ...] = ()


def drift_of(plan: Plan, spec: PipelineSpec | None = None) -> Drift:
    """Compare the plan with this machine now. Weights of a live pipeline (`spec`) do not count as used memory.

    A plan for the CPU is compared with the RAM, a plan for an accelerator with the device of that name here.

    Raises:
        UsageError: an edited setting that cannot be.
    """
    parse_settings(plan, None, plan.machine.accelerator)
    hardware = detect()
    planned, device = plan.machine.accelerator, plan.machine.device
    here = next((item for item in hardware.accelerators if item.device == device), None) if planned else None
    if planned is not None and here is None:
        notes = "".join(f"; {note}" for note in hardware.notes)  # such as a driver that no longer answers
        reason = f"the plan is for {planned.name} ({device}), which this machine does not have{notes}"
        return _broken("no device", reason)
    if planned is not None and here is not None and planned.name != here.name:
        reason = f"the plan is for {planned.name}, but {device} is {here.name}: make a plan for it"
        return _broken("another device", reason)
    try:
        budget = _budget(plan, hardware, here, held_bytes(spec) if spec else {})
    except (NothingFitsError, UsageError) as error:
        return _broken("no memory", f"the plan no longer fits: {error}")
    sentence = fits_sentence(plan.projected, budget)
    if _short(plan, budget):
        return _broken("short", f"the plan no longer fits: it {sentence}; make it again")
    return Drift(sentence=f"the plan fits: it {sentence}", changes=(*_less(plan, budget), *_software(plan, here)))


def current_plan(
    plan: Plan,
    model: str | None = None,
    *,
    describe_folder: Callable[[], Model | None] | None = None,
    replan: bool = False,
    allow_pickle: bool = False,
    say: Say = print,
) -> Plan:
    """Return the plan if it still holds, reporting changes through `say`; otherwise, with `replan`, a new one like it.

    `describe_folder` describes the folder to load from; a caller that needs its result too gives one that keeps it.

    Raises:
        MismatchError: the plan no longer holds. NothingFitsError: no other plan fits either.
    """
    describe_folder = describe_folder or partial(described_folder, plan, model, allow_pickle=allow_pickle)
    found = drift_of(plan)
    if found.broken is None:
        found = _mismatch(describe_folder(), plan) or found
    broken = found.broken
    if broken is None:
        for change in found.changes:
            say(f"changed since it was planned: {change}")
        return plan
    if not replan:
        raise MismatchError(
            broken + (" (`replan=True` does so)" if found.kind in _ADVISED else "; `replan=True` makes another")
        )
    made = replanned(plan, model, allow_pickle=allow_pickle, described=describe_folder())
    say(f"{broken}. Planned again: {settings_text(made.settings)}")
    return made


def replanned(
    plan: Plan, model: str | None = None, *, allow_pickle: bool = False, described: Model | None = None
) -> Plan:
    """Plan again for this machine now: same model, workload and preferences, settings fixed by hand included."""
    devices = {item.device for item in detect().accelerators} | {"cpu"}
    device = plan.machine.device if plan.machine.device in devices else None
    request = replace(request_of(plan), device=device, allow_pickle=allow_pickle)
    subject = Subject(model or plan.model.origin, request, described=described)
    return subject.plan_with_stock(subject.workload(), *choose_machine(device, vram=request.vram))


def described_folder(plan: Plan, model: str | None = None, *, allow_pickle: bool = False) -> Model | None:
    """Describe the folder to load the plan's pipeline from, before its weights are loaded.

    Return None if it is not a folder, or if the plan loads a mix of dtypes, which only the loaded pipeline shows.
    """
    folder = Folder(Path(model)) if model else plan.model.origin
    options = load_options(plan)
    if options["dtype"] is None or not (isinstance(folder, Folder) and folder.path.is_dir()):
        return None
    return describe(folder, allow_pickle=allow_pickle, **options)


def _broken(kind: DriftKind, sentence: str) -> Drift:
    return Drift(sentence=sentence, kind=kind, broken=sentence)


def _budget(plan: Plan, hardware: Hardware, here: Accelerator | None, held: Mapping[str, int]) -> Budget:
    """The budget as requested, capped at what is free now: a given amount does not account for other programs."""
    asked = plan.asked
    amounts = {"vram": asked.vram if here else None, "ram": asked.ram, "margin": asked.margin, **held}
    kinds, pipeline = plan.machine.budget.kinds, plan.model.class_name
    budget = known_budget(hardware, here, amounts, basis=plan.projected.basis, pipeline=pipeline, kinds=kinds)
    free = here.free_bytes if here else None
    if asked.vram is not None and budget.vram_bytes is not None and free is not None:
        budget = replace(budget, vram_bytes=min(budget.vram_bytes, free + held.get("held_vram_bytes", 0)))
    if asked.ram is not None:
        there = hardware.host.available_bytes + held.get("held_ram_bytes", 0)
        budget = replace(budget, ram_bytes=min(budget.ram_bytes, there))
    return budget


def _short(plan: Plan, budget: Budget) -> bool:
    short_vram = (budget.vram_bytes or 0) < plan.projected.vram_reserved_bytes
    short_ram = budget.ram_bytes < plan.projected.ram_bytes
    return short_vram or short_ram or (budget.disk_bytes is not None and budget.disk_bytes < plan.projected.disk_bytes)


def _less(plan: Plan, budget: Budget) -> Iterator[str]:
    """Yield a sentence for each kind of memory of which less may be used now."""
    before = plan.machine.budget
    for name, planned, now in (
        ("VRAM", before.vram_bytes, budget.vram_bytes),
        ("RAM", before.ram_bytes, budget.ram_bytes),
    ):
        if planned is not None and now is not None and now < planned * (1 - _NOTICED):
            yield f"{format_bytes(now)} of {name} may be used, {format_bytes(planned)} when it was planned"


def _software(plan: Plan, here: Accelerator | None) -> Iterator[str]:
    """Yield a sentence for each changed version or driver: the same settings may use a different amount of memory."""
    installed = versions()
    for name, planned in plan.machine.software.items():
        if installed.get(name) != planned:
            yield f"{name} is {installed.get(name, 'missing')}, it was planned with {planned}"
    before = plan.machine.accelerator
    if before is not None and here is not None and before.driver not in (None, here.driver):
        yield f"the driver is {here.driver}, it was planned with {before.driver}"


def _mismatch(described: Model | None, plan: Plan) -> Drift | None:
    """The reason why this is not the planned pipeline, None where it is, and where that is not known yet."""
    if described is None:
        return None
    try:
        check_match(described.spec, plan)
    except MismatchError as error:
        same = described.spec.class_name == plan.model.class_name
        return _broken("changed pipeline" if same else "another pipeline", str(error))
    return None
