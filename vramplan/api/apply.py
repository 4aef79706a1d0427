"""`auto_configure` and `apply_plan`: a plan on a live pipeline."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Unpack

from vramplan.api.machine import choose_machine
from vramplan.api.plan import Subject
from vramplan.api.request import PlanOptions, PlanRequest, make_request
from vramplan.errors import MismatchError
from vramplan.pipeline.live import spec_from_pipeline
from vramplan.pipeline.types import PipelineSpec
from vramplan.planfile.types import Plan
from vramplan.runtime.applied import Applied, applied_to, apply_unchecked, check_device, without_earlier_plan


def auto_configure(
    pipe: Any, request: PlanRequest | None = None, *, recover: bool = False, **options: Unpack[PlanOptions]
) -> Plan:
    """Detect, plan and apply in one call on a live pipeline; returns the plan, which prints itself.

    `request` and `options` are those of `vramplan.plan`. A plan that vramplan applied before is replaced. With
    `recover` the pipeline's own call is made as `vramplan.recovering_call` makes it, until the plan is undone.

    Raises:
        NothingFitsError: no candidate fits; the pipeline is untouched.
        VramplanError: the pipeline already carries offload hooks that vramplan did not set, or is no pipeline.
    """
    request = request or make_request(options)
    with without_earlier_plan(pipe):
        subject = Subject(pipe, request)
        plan = subject.plan(subject.workload(), *choose_machine(request.device, vram=request.vram))
        applied = apply_unchecked(pipe, plan, spec=subject.spec)
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
    spec = None
    if device is None and applied_to(pipe) is None:
        check_device(plan.machine.device, plan)
        spec = spec_from_pipeline(pipe)
        _warn_of_drift(plan, spec)
    return apply_unchecked(pipe, plan, device=device, spec=spec)


def _warn_of_drift(plan: Plan, spec: PipelineSpec) -> None:
    from vramplan.api.check import drift_of

    found = drift_of(plan, spec)
    if found.broken is not None:
        raise MismatchError(found.broken)
    for change in found.changes:
        warnings.warn(f"changed since it was planned: {change}", stacklevel=3)
