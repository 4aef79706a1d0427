"""Apply a plan to a live pipeline and undo it. If applying fails, the pipeline is left unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vramplan.common.progress import byte_progress
from vramplan.errors import MismatchError, VramplanError
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.geometry import module_bytes
from vramplan.pipeline.live import spec_from_pipeline
from vramplan.pipeline.live_memory import refuse_hooked
from vramplan.pipeline.modules import modules_of, pipes_of
from vramplan.pipeline.own_class import take_class
from vramplan.pipeline.types import PipelineSpec
from vramplan.planfile.match import calls_of, check_match, parse_settings
from vramplan.planfile.types import Plan
from vramplan.runtime.changes import State, change_since, state_of
from vramplan.runtime.snapshot import Before, Snapshot, uninterrupted
from vramplan.strategies.base import Decodes, Placed, apply_settings, unpinned

_MARK = "_vramplan_applied"


@dataclass(slots=True, kw_only=True)
class Applied:
    """A plan applied to a live pipeline. `calls` are the diffusers calls that were made, as lines of Python.

    `notes` say where applying had to differ from the plan.
    """

    pipe: Any
    plan: Plan
    device: str
    calls: tuple[str, ...]
    notes: tuple[str, ...] = ()
    _before: Before = field(repr=False)
    _placed: Placed = field(repr=False, default=())
    _decodes: Decodes = field(repr=False, default=())
    _state: Mapping[str, State] = field(repr=False, default_factory=dict)

    @property
    def changed(self) -> str | None:
        """A sentence on what was changed in the pipeline since, such as a LoRA loaded; None if nothing was."""
        return change_since(self.pipe, self._state)

    def undo(self) -> Any:
        """Restore the pipeline: remove hooks, move weights to where they were, restore VAE settings. Return it.

        Ctrl-C waits until it is done. If it fails, for example for lack of RAM, no weight is lost and the plan still
        counts as applied: call it again.

        Raises:
            VramplanError: the plan rounded weights, which cannot be restored; the pipeline stays as it is.
        """
        self._refuse_rounded()
        with uninterrupted():
            if self.pipe.__dict__.get(_MARK) is self:
                self._before.restore(self.pipe, self._placed)
                for part in pipes_of(self.pipe):
                    take_class(part)
                del self.pipe.__dict__[_MARK]
        return self.pipe

    def _refuse_rounded(self) -> None:
        rounded = [setting.name for setting, _ in self._placed if setting.axis == "weights"]
        if rounded:
            raise VramplanError(f"{rounded[0]} has rounded weights, which cannot be undone: load the pipeline again")

    def _reapply(self) -> None:
        """Apply this plan again after an undo, complete or partial, whose replacement failed."""
        with uninterrupted():
            self._before.restore(self.pipe, self._placed)
            self.pipe.__dict__.pop(_MARK, None)
            with _restore_on_error(self.pipe, self._placed):
                _apply_with_progress(self.pipe, self._placed, self._decodes, self.device)
                self.pipe.__dict__[_MARK] = self


def applied_to(pipe: Any) -> Applied | None:
    """Return the plan that vramplan has applied to this pipeline, as `Applied`, or None."""
    return getattr(pipe, "__dict__", {}).get(_MARK)


def apply_unchecked(pipe: Any, plan: Plan, *, device: str | None = None, spec: PipelineSpec | None = None) -> Applied:
    """Apply the plan to a live pipeline as `apply_plan` does, without checking that it still fits.

    `spec` describes the pipeline without a plan, if the caller has described it already.
    """
    earlier = applied_to(pipe)
    target = device or plan.machine.device
    if earlier is not None and earlier.plan == plan and earlier.device == target and earlier.changed is None:
        return earlier
    check_device(target, plan)
    with without_earlier_plan(pipe):
        return _check_and_apply(pipe, plan, target, spec or spec_from_pipeline(pipe))


@contextmanager
def without_earlier_plan(pipe: Any) -> Iterator[None]:
    """Context manager: undo an applied plan for the block, and apply it again if the block fails."""
    earlier, cls = applied_to(pipe), type(pipe)
    if earlier is None:
        yield
        return
    earlier._refuse_rounded()
    try:
        earlier.undo()
        yield
    except BaseException:
        now = applied_to(pipe)
        if now is None or now is earlier:  # not if a new plan is fully applied already
            earlier._reapply()
            pipe.__class__ = cls
        raise


@contextmanager
def _restore_on_error(pipe: Any, placed: Placed) -> Iterator[None]:
    """Context manager: restore the pipeline, object by object, if the block fails."""
    rounded = [name for setting, names in placed if setting.axis == "weights" for name in names]
    snapshot = Snapshot.of(pipe, rounded)
    try:
        yield
    except BaseException:
        with uninterrupted():
            snapshot.put_back()
        raise


def _check_and_apply(pipe: Any, plan: Plan, target: str, spec: PipelineSpec) -> Applied:
    """Check the plan and apply it to a pipeline without one; if anything fails, the pipeline is left unchanged."""
    check_match(spec, plan)
    refuse_hooked(spec)
    placed, decodes = parse_settings(plan, spec, planned_accelerator(plan, target))
    try:
        return finish_applying(pipe, plan, target, placed=placed, decodes=decodes, remaining=placed)
    except (RuntimeError, MemoryError) as error:
        fallback = unpinned(placed)
        if fallback == placed or applied_to(pipe) is not None:  # once fully applied, pinning was not what failed
            raise
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    note = f"weights are pinned on the fly (low_cpu_mem_usage=true), which is slower: they could not be once ({reason})"
    return finish_applying(pipe, plan, target, placed=fallback, decodes=decodes, remaining=fallback, notes=(note,))


def finish_applying(
    pipe: Any,
    plan: Plan,
    target: str,
    *,
    placed: Placed,
    decodes: Decodes,
    remaining: Placed,
    devices: Mapping[str, str] | None = None,
    notes: tuple[str, ...] = (),
) -> Applied:
    """Apply the settings in `remaining`, the part of `placed` not applied yet, and all `decodes` to a checked pipeline.

    `devices` gives the device that undoing returns each component to, for a pipeline placed while it was loaded.
    """
    from vramplan.streaming.attach import join

    rounded = {name for setting, names in placed if setting.axis == "weights" for name in names}
    applied = Applied(
        pipe=pipe,
        plan=plan,
        device=target,
        calls=tuple(calls_of(placed, decodes, target, modules_of(pipe))),
        notes=notes,
        _before=Before.of(pipe, rounded, devices),
        _placed=placed,
        _decodes=decodes,
    )
    with _restore_on_error(pipe, remaining):
        _apply_with_progress(pipe, remaining, decodes, target)
        join(pipe)  # what was streamed while it was loaded shares one cache from now on
        applied._state = state_of(pipe)
        pipe.__dict__[_MARK] = applied
    return applied


def _apply_with_progress(pipe: Any, placed: Placed, decodes: Decodes, device: str) -> None:
    """Apply the settings with a progress bar: moving and rounding weights may take long."""
    sizes = {name: module_bytes(module) for name, module in modules_of(pipe).items()}

    def size(names: Iterable[str]) -> int:
        return sum(sizes[name] for name in names)

    with byte_progress("applying the plan", sum(size(names) for _, names in placed)) as advance:
        apply_settings(pipe, placed, decodes, device, done=lambda names: advance(size(names)))


def check_device(device: str, plan: Plan) -> None:
    """Raise MismatchError if torch has no such device here."""
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


def planned_accelerator(plan: Plan, device: str) -> Accelerator | None:
    """The accelerator that settings are checked against: the planned card, or a stand-in if `device` is the CPU."""
    planned = plan.machine.accelerator
    if planned is None or device.partition(":")[0] != "cpu":
        return planned
    return Accelerator(kind="mps", index=0, name="cpu", total_bytes=planned.total_bytes, free_bytes=None)
