"""Changing a pipeline that has a plan on it: loading a LoRA or an IP-Adapter, exchanging a component."""

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
    """Inside the block the plan is off; after it a new one is on, made for what the pipeline is by then.

    The new plan is for the machine, workload and wishes of the old one, with the added weights charged; `options` are
    those of `vramplan.plan` and win over that. If the block fails, or nothing fits any more, the old plan is on again.

    Loading a LoRA with a plan on goes wrong in silence: diffusers 0.42 takes its group offloading off and puts it on
    again, which makes plain groups of partial residency, loses weights that are in files, and gives a LoRA the 8 bits
    of a cast layer.

    Raises:
        VramplanError: vramplan has applied nothing to this pipeline, or what cannot be taken off.
        NothingFitsError: no plan fits the pipeline as it has become.
    """
    applied = applied_to(pipe)
    if applied is None:
        raise VramplanError("vramplan has applied no plan to this pipeline: change it, then apply one")
    with without_earlier_plan(pipe):
        yield
        apply_unchecked(pipe, planned_anew(pipe, applied.plan, **options), device=applied.device)


def planned_anew(pipe: Any, plan: Plan, **options: Any) -> Plan:
    """Plan for a pipeline as it is now: on the machine, within the memory and by the preferences of an earlier plan."""
    machine, budget = plan.machine, plan.machine.budget
    hardware = Hardware(accelerators=(machine.accelerator,) if machine.accelerator else (), host=machine.host)
    request = request_of(plan)
    gone = {record.name for record in plan.model.components} - modules_of(pipe).keys()  # encoders that ran first
    given: dict[str, Any] = {
        "device": hardware,
        "vram": None if budget.vram_bytes is None else str(budget.vram_bytes),
        "ram": str(budget.ram_bytes),
        "margin": request.margin,
        "allow": request.allow,
        "prefer": request.prefer,
        "settings": {key: text for key, text in request.settings.items() if key.partition(".")[2] not in gone},
        **request.workload,
    }
    made = make_plan(pipe, **(given | options))
    return replace(made, asked=replace(made.asked, vram=plan.asked.vram, ram=plan.asked.ram))
