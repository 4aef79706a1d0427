"""Changing a pipeline that has a plan on it: loading a LoRA or an IP-Adapter, exchanging a component."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from vramplan.apply import applied_to, apply_plan, earlier_off
from vramplan.errors import VramplanError
from vramplan.hardware.types import Hardware
from vramplan.planfile import Plan
from vramplan.planning import plan as make_plan


@contextmanager
def changing(pipe: Any, **options: Any) -> Iterator[None]:
    """Inside the block the plan is off; after it a new one is on, made for what the pipeline is by then.

    The new plan is for the machine, workload and quality of the old one, with the added weights charged; `options` are
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
    with earlier_off(pipe):
        yield
        apply_plan(pipe, planned_anew(pipe, applied.plan, **options), device=applied.device)


def planned_anew(pipe: Any, plan: Plan, **options: Any) -> Plan:
    """The plan for a pipeline as it is now, on the machine and within the memory of an earlier one."""
    machine, budget = plan.machine, plan.machine.budget
    hardware = Hardware(accelerators=(machine.accelerator,) if machine.accelerator else (), host=machine.host)
    told: dict[str, Any] = {name: value for name, value in asdict(plan.workload).items() if value is not None}
    told |= {
        "device": hardware,
        "vram": None if budget.vram_bytes is None else str(budget.vram_bytes),
        "ram": str(budget.ram_bytes),
        "allow": "lossy" if plan.quality == "lossy" else None,
    }
    return make_plan(pipe, **told | options)
