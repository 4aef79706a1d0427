"""Change a pipeline under an applied plan: load a LoRA or an IP-Adapter, exchange a component."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from vramplan.api.plan import plan as make_plan
from vramplan.api.request import request_of
from vramplan.errors import VramplanError
from vramplan.hardware.types import Hardware
from vramplan.pipeline.modules import modules_of
from vramplan.planfile.types import Plan
from vramplan.runtime.applied import applied_to, apply_unchecked, without_earlier_plan


@contextmanager
def changing(pipe: Any, **options: Any) -> Iterator[None]:
    """Context manager: undo the plan for the block, then apply a new one made for the changed pipeline.

    The new plan keeps the machine, workload and preferences of the old one and counts the added weights; `options` are
    those of `vramplan.plan` and take precedence. If the block fails, or nothing fits, the old plan is applied again.

    Loading a LoRA under an applied plan fails silently: diffusers 0.42 removes its group offloading and adds it again,
    which turns partial residency into plain groups, loses weights kept in files, and casts a LoRA to a layer's 8 bits.

    Raises:
        VramplanError: vramplan has applied nothing to this pipeline, or a plan that cannot be undone.
        NothingFitsError: no plan fits the changed pipeline.
    """
    applied = applied_to(pipe)
    if applied is None:
        raise VramplanError("vramplan has applied no plan to this pipeline: change it, then apply one")
    with without_earlier_plan(pipe):
        yield
        apply_unchecked(pipe, plan_again(pipe, applied.plan, **options), device=applied.device)


def plan_again(pipe: Any, plan: Plan, **options: Any) -> Plan:
    """Plan for a pipeline as it is now, with the machine, memory budget and preferences of an earlier plan."""
    machine, budget = plan.machine, plan.machine.budget
    hardware = Hardware(accelerators=(machine.accelerator,) if machine.accelerator else (), host=machine.host)
    request = request_of(plan)
    removed = {record.name for record in plan.model.components} - modules_of(pipe).keys()  # encoders already freed
    given: dict[str, Any] = {
        "device": hardware,
        "vram": None if budget.vram_bytes is None else str(budget.vram_bytes),
        "ram": str(budget.ram_bytes),
        "margin": request.margin,
        "allow": request.allow,
        "prefer": request.prefer,
        "stock": request.stock,
        "settings": {key: text for key, text in request.settings.items() if key.partition(".")[2] not in removed},
        **request.workload,
    }
    made = make_plan(pipe, **(given | options))
    return replace(made, asked=replace(made.asked, vram=plan.asked.vram, ram=plan.asked.ram))
