"""From a plan to a live pipeline, and back. Either the whole plan is on it, or it is as it was."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vramplan.errors import MismatchError, VramplanError
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.component import device_of
from vramplan.pipeline.live import modules_of, spec_from_pipeline
from vramplan.planfile import Plan
from vramplan.planned import calls_of, check_match, parse_settings
from vramplan.planner.decide import Prefer
from vramplan.planning import plan as make_plan
from vramplan.planning import refuse_hooked
from vramplan.strategies.base import Decodes, Execution, Placed, Quality, put_on
from vramplan.strategies.kernel_state import State, kernel_state, restore_kernels

_MARK = "_vramplan_applied"
# On the class of a pipeline whose own call recovers: the class it had before.
PLAIN = "_vramplan_plain_class"
# What settings leave on a pipeline object: diffusers' offload calls (0.42, pipeline_utils.py), and a chunk size.
_PIPE_ATTRIBUTES = ("_all_hooks", "_offload_device", "_offload_gpu_id", "decode_latents")
_ABSENT = object()


@dataclass(slots=True, kw_only=True)
class Applied:
    """A plan on a live pipeline. `calls` are the diffusers calls that were made, as lines of Python."""

    pipe: Any
    plan: Plan
    device: str
    calls: tuple[str, ...]
    _before: _Snapshot = field(repr=False)
    _placed: Placed = field(repr=False, default=())
    _decodes: Decodes = field(repr=False, default=())

    def undo(self) -> Any:
        """The pipeline as it was before: hooks off, weights where they were, VAE settings back.

        Raises:
            VramplanError: the plan rounded weights, which nothing can put back; the pipeline stays as it is.
        """
        rounded = [setting.name for setting, _ in self._placed if setting.axis == "weights"]
        if rounded:
            raise VramplanError(f"{rounded[0]} has rounded weights, which cannot be undone: load the pipeline anew")
        if self.pipe.__dict__.get(_MARK) is self:
            del self.pipe.__dict__[_MARK]
            self.pipe.__class__ = plain_class(self.pipe)
            self._before.restore(self.pipe, self._placed)
        return self.pipe


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
    with _earlier_off(pipe):
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
        applied_anyway(pipe, plan)
        if recover:
            from vramplan.recover import recovering

            recovering(pipe)
    return plan


def plain_class(pipe: Any) -> type:
    """The pipeline's class as diffusers has it, also while its own call recovers."""
    return getattr(type(pipe), PLAIN, type(pipe))


def applied_to(pipe: Any) -> Applied | None:
    """What vramplan has applied to this pipeline, None for nothing."""
    return getattr(pipe, "__dict__", {}).get(_MARK)


def apply_plan(pipe: Any, plan: Plan, *, device: str | None = None) -> Applied:
    """Make the plan so on a live pipeline. Applying it twice is the same as once; another one replaces it.

    `device` overrides the torch device of the plan; `cpu` runs the offload hooks without an accelerator.

    Raises:
        MismatchError: the plan is for another pipeline, for a device that is not here, or no longer fits. What else has
            changed since it was planned is a warning.
        UsageError: an edited setting that cannot be. In each case the pipeline is as it was.
    """
    if device is None and applied_to(pipe) is None:
        check_device(plan.machine.device, plan)
        _tell_drift(pipe, plan)
    return applied_anyway(pipe, plan, device=device)


def _tell_drift(pipe: Any, plan: Plan) -> None:
    from vramplan.drift import drift_of

    found = drift_of(plan, spec_from_pipeline(pipe))
    if found.broken is not None:
        raise MismatchError(found.broken)
    for change in found.changes:
        warnings.warn(f"changed since it was planned: {change}", stacklevel=3)


def applied_anyway(pipe: Any, plan: Plan, *, device: str | None = None) -> Applied:
    """The plan on a live pipeline, as `apply_plan` does it, without asking whether it still fits."""
    earlier = applied_to(pipe)
    target = device or plan.machine.device
    if earlier is not None and earlier.plan == plan and earlier.device == target:
        return earlier
    check_device(target, plan)
    with _earlier_off(pipe):
        return _applied_anew(pipe, plan, target)


@contextmanager
def _earlier_off(pipe: Any) -> Iterator[None]:
    """What vramplan had applied is off inside the block, and on again if the block fails."""
    earlier, cls = applied_to(pipe), type(pipe)
    if earlier is not None:
        earlier.undo()
    try:
        yield
    except BaseException:
        if earlier is not None:
            pipe.__class__ = cls
            put_on(pipe, earlier._placed, earlier._decodes, earlier.device)
            pipe.__dict__[_MARK] = earlier
        raise


def _applied_anew(pipe: Any, plan: Plan, target: str) -> Applied:
    """The plan on a pipeline that has none, checked first; the pipeline as it was if anything fails."""
    spec = spec_from_pipeline(pipe)
    check_match(spec, plan)
    refuse_hooked(spec)
    placed, decodes = parse_settings(plan, spec, planned_accelerator(plan, target))
    return finish_applying(pipe, plan, target, placed=placed, decodes=decodes, still=placed)


def finish_applying(
    pipe: Any,
    plan: Plan,
    target: str,
    *,
    placed: Placed,
    decodes: Decodes,
    still: Placed,
    devices: Mapping[str, str] | None = None,
) -> Applied:
    """Put on a checked pipeline what is `still` to be put of the settings `placed`, and all of `decodes`.

    `devices` says where components go back to when it is undone, where that is not where they are now.
    """
    rounded = {name for setting, names in placed if setting.axis == "weights" for name in names}
    before = _Snapshot.of(pipe, devices, rounded=rounded)
    calls = tuple(calls_of(placed, decodes, target, modules_of(pipe)))
    try:
        put_on(pipe, still, decodes, target)
    except BaseException:
        before.restore(pipe, placed)
        raise
    applied = Applied(
        pipe=pipe,
        plan=plan,
        device=target,
        calls=calls,
        _before=before,
        _placed=placed,
        _decodes=decodes,
    )
    pipe.__dict__[_MARK] = applied
    return applied


def check_device(device: str, plan: Plan) -> None:
    """Raises MismatchError where torch has no such device here."""
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
    """What settings are checked against: the planned card, or the CPU standing in for one on request."""
    planned = plan.machine.accelerator
    if planned is None or device.partition(":")[0] != "cpu":
        return planned
    return Accelerator(kind="mps", index=0, name="cpu", total_bytes=planned.total_bytes, free_bytes=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    """What has to be put back: where each module was, its kernels, and the settings on VAEs and pipeline."""

    modules: Mapping[str, Any]
    parameters: Sequence[tuple[Any, Mapping[str, Any]]]
    devices: Mapping[str, str]
    settings: Mapping[str, Mapping[str, Any]]
    kernels: Mapping[str, State]
    attributes: Mapping[str, Any]

    @classmethod
    def of(cls, pipe: Any, devices: Mapping[str, str] | None = None, *, rounded: Collection[str] = ()) -> _Snapshot:
        """Before a plan is applied that rounds some components: their parameters are not held on to."""
        modules = modules_of(pipe)
        kept = [module for name, module in modules.items() if name not in rounded]
        return cls(
            modules=modules,
            parameters=[(child, dict(child._parameters)) for module in kept for child in module.modules()],
            devices=devices or {name: device_of(module) or "cpu" for name, module in modules.items()},
            settings={name: decode_settings(module) for name, module in modules.items()},
            kernels={name: kernel_state(module) for name, module in modules.items()},
            attributes={name: pipe.__dict__.get(name, _ABSENT) for name in _PIPE_ATTRIBUTES},
        )

    def restore(self, pipe: Any, placed: Placed) -> None:
        """Hooks off in any case, whatever of the plan had been reached.

        A component that was taken out or replaced since then is left as it is.
        """
        here = modules_of(pipe)
        kept: dict[str, Any] = {name: module for name, module in self.modules.items() if here.get(name) is module}
        for setting, names in placed:
            if not isinstance(setting, Execution):
                setting.remove(pipe, [name for name in names if name in kept])
        for child, parameters in self.parameters:
            _tie_again(child, parameters)
        for name, module in kept.items():
            module.to(self.devices[name])
            vars(module).update(self.settings[name])
            restore_kernels(self.kernels[name])
        for name, value in self.attributes.items():
            if value is _ABSENT:
                pipe.__dict__.pop(name, None)
            else:
                pipe.__dict__[name] = value


def _tie_again(child: Any, parameters: Mapping[str, Any]) -> None:
    """The very parameters from before, where the same memory is now called by new ones.

    accelerate 1.15 makes a new Parameter for each name when its hooks are taken off: tied ones are tied no more.
    """
    for name, before in parameters.items():
        now = child._parameters.get(name)
        if before is not None and now is not None and now is not before and now.data_ptr() == before.data_ptr():
            child._parameters[name] = before


def decode_settings(module: Any) -> dict[str, Any]:
    """The plain attributes of a module that slicing, tiling and frame-wise decoding change."""
    return {
        name: value
        for name, value in vars(module).items()
        if name.startswith(("tile_", "use_tiling", "use_slicing", "use_framewise"))
    }
