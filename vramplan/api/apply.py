"""`auto_configure` and `apply_plan`: a plan on a live pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vramplan.api.plan import plan as make_plan
from vramplan.errors import MismatchError
from vramplan.pipeline.live import spec_from_pipeline
from vramplan.planfile.types import Plan
from vramplan.planner.order import Prefer
from vramplan.runtime.applied import Applied, applied_to, apply_unchecked, check_device, without_earlier_plan
from vramplan.strategies.base import Quality


def auto_configure(
    pipe: Any,
    *,
    device: str | None = None,
    vram: str | None = None,
    ram: str | None = None,
    margin: str | None = None,
    allow: Quality | None = None,
    prefer: Prefer = "speed",
    settings: Mapping[str, str | Sequence[str]] | None = None,
    recover: bool = False,
    **workload: Any,
) -> Plan:
    """Detect, plan and apply in one call on a live pipeline; returns the plan, which prints itself.

    The arguments are those of `vramplan.plan`. A plan that vramplan applied before is replaced. With `recover` the
    pipeline's own call is made as `vramplan.recovering_call` makes it, until the plan is undone.

    Raises:
        NothingFitsError: no candidate fits; the pipeline is untouched.
        VramplanError: the pipeline already carries offload hooks of somebody else's, or is no pipeline.
    """
    with without_earlier_plan(pipe):
        plan = make_plan(
            pipe,
            device=device,
            vram=vram,
            ram=ram,
            margin=margin,
            allow=allow,
            prefer=prefer,
            settings=settings,
            **workload,
        )
        applied = apply_unchecked(pipe, plan)
        if recover:
            from vramplan.api.recover import recovering

            recovering(pipe)
    return replace(plan, notes=(*plan.notes, *applied.notes)) if applied.notes else plan


def apply_plan(pipe: Any, plan: Plan, *, device: str | None = None) -> Applied:
    """Make the plan so on a live pipeline. Applying it twice is the same as once; another one replaces it.

    `device` overrides the torch device of the plan; `cpu` runs the offload hooks without an accelerator. Where weights
    cannot be pinned, the plan is put on without pinned copies, and `notes` of what is returned tell so.

    Raises:
        MismatchError: the plan is for another pipeline, for a device that is not here, or no longer fits. What else has
            changed since it was planned is a warning.
        UsageError: an edited setting that cannot be. In each case the pipeline is as it was.
    """
    if device is None and applied_to(pipe) is None:
        check_device(plan.machine.device, plan)
        _tell_drift(pipe, plan)
    return apply_unchecked(pipe, plan, device=device)


def _tell_drift(pipe: Any, plan: Plan) -> None:
    from vramplan.api.check import drift_of

    found = drift_of(plan, spec_from_pipeline(pipe))
    if found.broken is not None:
        raise MismatchError(found.broken)
    for change in found.changes:
        warnings.warn(f"changed since it was planned: {change}", stacklevel=3)
