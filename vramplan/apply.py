"""From a plan to a live pipeline, and back. Either the whole plan is on it, or it is as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from vramplan.errors import MismatchError, VramplanError
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.live import modules_of, spec_from_pipeline
from vramplan.planfile import Plan
from vramplan.planned import calls_of, check_match, parse_settings
from vramplan.planner.decide import Prefer
from vramplan.planning import plan as make_plan
from vramplan.planning import refuse_hooked
from vramplan.snapshot import Before, Snapshot, uninterrupted
from vramplan.strategies.base import Decodes, Placed, Quality, put_on, unpinned

_MARK = "_vramplan_applied"


@dataclass(slots=True, kw_only=True)
class Applied:
    """A plan on a live pipeline. `calls` are the diffusers calls that were made, as lines of Python.

    `notes` tell where it had to be done otherwise than planned.
    """

    pipe: Any
    plan: Plan
    device: str
    calls: tuple[str, ...]
    notes: tuple[str, ...] = ()
    _before: Before = field(repr=False)
    _placed: Placed = field(repr=False, default=())
    _decodes: Decodes = field(repr=False, default=())

    def undo(self) -> Any:
        """The pipeline as it was before: hooks off, weights where they were, VAE settings back.

        Ctrl-C waits until it is done. If it fails, as for want of RAM, no weight is lost and the plan still counts as
        applied: call it again.

        Raises:
            VramplanError: the plan rounded weights, which nothing can put back; the pipeline stays as it is.
        """
        self._refuse_rounded()
        with uninterrupted():
            if self.pipe.__dict__.get(_MARK) is self:
                self._before.restore(self.pipe, self._placed)
                del self.pipe.__dict__[_MARK]
        return self.pipe

    def _refuse_rounded(self) -> None:
        rounded = [setting.name for setting, _ in self._placed if setting.axis == "weights"]
        if rounded:
            raise VramplanError(f"{rounded[0]} has rounded weights, which cannot be undone: load the pipeline anew")

    def _put_on_again(self) -> None:
        """After an undo that nothing came of, whole or half done."""
        with uninterrupted():
            self._before.restore(self.pipe, self._placed)
            self.pipe.__dict__.pop(_MARK, None)
            with _all_or_nothing(self.pipe, self._placed):
                put_on(self.pipe, self._placed, self._decodes, self.device)
                self.pipe.__dict__[_MARK] = self


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
    **workload: Any,
) -> Plan:
    """Detect, plan and apply in one call on a live pipeline; returns the plan, which prints itself.

    The arguments are those of `vramplan.plan`. A plan that vramplan applied before is replaced.

    Raises:
        NothingFitsError: no candidate fits; the pipeline is untouched.
        VramplanError: the pipeline already carries offload hooks of somebody else's, or is no pipeline.
    """
    with earlier_off(pipe):
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
        applied = apply_plan(pipe, plan)
    return replace(plan, notes=(*plan.notes, *applied.notes)) if applied.notes else plan


def applied_to(pipe: Any) -> Applied | None:
    """What vramplan has applied to this pipeline, None for nothing."""
    return getattr(pipe, "__dict__", {}).get(_MARK)


def apply_plan(pipe: Any, plan: Plan, *, device: str | None = None) -> Applied:
    """Make the plan so on a live pipeline. Applying it twice is the same as once; another one replaces it.

    `device` overrides the torch device of the plan; `cpu` runs the offload hooks without an accelerator. Where weights
    cannot be pinned, the plan is put on without pinned copies, and `notes` of what is returned tell so.

    Raises:
        MismatchError: the plan is for another pipeline, or for a device that is not here.
        UsageError: an edited setting that cannot be. In each case the pipeline is as it was.
    """
    earlier = applied_to(pipe)
    target = device or plan.machine.device
    if earlier is not None and earlier.plan == plan and earlier.device == target:
        return earlier
    _check_device(target, plan)
    with earlier_off(pipe):
        return _applied_anew(pipe, plan, target)


@contextmanager
def earlier_off(pipe: Any) -> Iterator[None]:
    """What vramplan had applied is off inside the block, and on again if the block fails."""
    earlier = applied_to(pipe)
    if earlier is None:
        yield
        return
    earlier._refuse_rounded()
    try:
        earlier.undo()
        yield
    except BaseException:
        now = applied_to(pipe)
        if now is None or now is earlier:  # and not the new one, where it was all on already
            earlier._put_on_again()
        raise


@contextmanager
def _all_or_nothing(pipe: Any, placed: Placed) -> Iterator[None]:
    """The pipeline is as it was, object by object, if the block fails."""
    rounded = [name for setting, names in placed if setting.axis == "weights" for name in names]
    snapshot = Snapshot.of(pipe, rounded)
    try:
        yield
    except BaseException:
        with uninterrupted():
            snapshot.put_back()
        raise


def _applied_anew(pipe: Any, plan: Plan, target: str) -> Applied:
    """The plan on a pipeline that has none, checked first; the pipeline as it was if anything fails."""
    spec = spec_from_pipeline(pipe)
    check_match(spec, plan)
    refuse_hooked(spec)
    placed, decodes = parse_settings(plan, spec, _accelerator(plan, target))
    try:
        return _put_on(pipe, plan, target, placed, decodes)
    except (RuntimeError, MemoryError) as error:
        lighter = unpinned(placed)
        if lighter == placed:
            raise
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    note = f"weights are pinned on the fly (low_cpu_mem_usage=true), which is slower: they could not be once ({reason})"
    return _put_on(pipe, plan, target, lighter, decodes, note)


def _put_on(pipe: Any, plan: Plan, target: str, placed: Placed, decodes: Decodes, *notes: str) -> Applied:
    applied = Applied(
        pipe=pipe,
        plan=plan,
        device=target,
        calls=tuple(calls_of(placed, decodes, target, modules_of(pipe))),
        notes=notes,
        _before=Before.of(pipe),
        _placed=placed,
        _decodes=decodes,
    )
    with _all_or_nothing(pipe, placed):
        put_on(pipe, placed, decodes, target)
        pipe.__dict__[_MARK] = applied
    return applied


def _check_device(device: str, plan: Plan) -> None:
    import torch

    kind, _, index = device.partition(":")
    if kind == "cpu":
        return
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    card = f" ({plan.machine.accelerator.name})" if plan.machine.accelerator else ""
    if found is None or found.type != kind:
        here = f"torch sees {found.type}" if found else "torch sees no accelerator"
        raise MismatchError(f"the plan is for {device}{card}; here {here}: make a plan for this machine")
    if index and not (index.isdecimal() and int(index) < torch.accelerator.device_count()):
        raise MismatchError(f"the plan is for {device}{card}; here are {torch.accelerator.device_count()} devices")


def _accelerator(plan: Plan, device: str) -> Accelerator | None:
    """What settings are checked against: the planned card, or the CPU standing in for one on request."""
    planned = plan.machine.accelerator
    if planned is None or device.partition(":")[0] != "cpu":
        return planned
    return Accelerator(kind="mps", index=0, name="cpu", total_bytes=planned.total_bytes, free_bytes=None)
