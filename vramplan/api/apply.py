"""`auto_configure` and `apply_plan`: apply a plan to a live pipeline."""

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
    """Detect the machine, plan and apply in one call on a live pipeline; return the plan, which prints itself.

    `request` and `options` are those of `vramplan.plan`. A plan that vramplan applied before is replaced. With
    `recover` the pipeline's own call retries like `vramplan.recovering_call` until the plan is undone.

    Raises:
        NothingFitsError: no candidate fits; the pipeline is untouched.
        VramplanError: the pipeline already carries offload hooks that vramplan did not set, or is no pipeline.
    """
    request = make_request(options, request)
    with without_earlier_plan(pipe):
        subject = Subject(pipe, request)
        plan = subject.plan_with_stock(subject.workload(), *choose_machine(request.device, vram=request.vram))
        applied = apply_unchecked(pipe, plan, spec=subject.spec)
        if recover:
            from vramplan.api.recover import make_recovering

            make_recovering(pipe)
    return replace(plan, notes=(*plan.notes, *applied.notes)) if applied.notes else plan


def apply_plan(pipe: Any, plan: Plan, *, device: str | None = None) -> Applied:
    """Apply the plan to a live pipeline. Applying it twice has no further effect; another plan replaces it.

    `device` overrides the torch device of the plan; `cpu` runs the offload hooks without an accelerator. Where weights
    cannot be page-locked (pinned), the plan is applied without pinned copies, and `notes` of the result say so.

    Raises:
        MismatchError: the plan is for another pipeline, for a device that is not here, or no longer fits. Any other
            change since it was planned is a warning.
        UsageError: an edited setting is not possible. In each case the pipeline is unchanged.
    """
    spec = None
    if device is None and applied_to(pipe) is None:
        check_device(plan.machine.device, plan)
        spec = spec_from_pipeline(pipe)
        _warn_about_drift(plan, spec)
    return apply_unchecked(pipe, plan, device=device, spec=spec)


def _warn_about_drift(plan: Plan, spec: PipelineSpec) -> None:
    from vramplan.api.check import drift_of

    found = drift_of(plan, spec)
    if found.broken is not None:
        raise MismatchError(found.broken)
    for change in found.changes:
        warnings.warn(f"changed since it was planned: {change}", stacklevel=3)
