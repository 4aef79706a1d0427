"""From a plan to a live pipeline, and back. Either the whole plan is on it, or it is as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vramplan.errors import MismatchError, UsageError
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.component import device_of, role_of
from vramplan.pipeline.live import modules_of, spec_from_pipeline
from vramplan.pipeline.types import PipelineSpec
from vramplan.planfile import Plan, fingerprint
from vramplan.planner.decide import Prefer
from vramplan.planning import plan as make_plan
from vramplan.planning import refuse_hooked
from vramplan.strategies.base import Decode, Placement, Quality
from vramplan.strategies.settings import format_setting, grouped, parse_decode, parse_placement

_MARK = "_vramplan_applied"
# What diffusers' offload calls leave on a pipeline object (0.42, pipeline_utils.py).
_PIPE_ATTRIBUTES = ("_all_hooks", "_offload_device", "_offload_gpu_id")
_ABSENT = object()


@dataclass(slots=True, kw_only=True)
class Applied:
    """A plan on a live pipeline. `calls` are the diffusers calls that were made, as lines of Python."""

    pipe: Any
    plan: Plan
    device: str
    calls: tuple[str, ...]
    _before: _Snapshot = field(repr=False)
    _placed: Sequence[tuple[Placement, Sequence[str]]] = field(repr=False, default=())
    _decodes: Sequence[tuple[Decode, Sequence[str]]] = field(repr=False, default=())

    def undo(self) -> Any:
        """The pipeline as it was before: hooks off, weights where they were, VAE settings back."""
        if self.pipe.__dict__.get(_MARK) is self:
            del self.pipe.__dict__[_MARK]
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
    **workload: Any,
) -> Plan:
    """Detect, plan and apply in one call on a live pipeline; returns the plan, which prints itself.

    The arguments are those of `vramplan.plan`. A plan that vramplan applied before is replaced.

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
        apply_plan(pipe, plan)
    return plan


def applied_to(pipe: Any) -> Applied | None:
    """What vramplan has applied to this pipeline, None for nothing."""
    return getattr(pipe, "__dict__", {}).get(_MARK)


def apply_plan(pipe: Any, plan: Plan, *, device: str | None = None) -> Applied:
    """Make the plan so on a live pipeline. Applying it twice is the same as once; another one replaces it.

    `device` overrides the torch device of the plan; `cpu` runs the offload hooks without an accelerator.

    Raises:
        MismatchError: the plan is for another pipeline, or for a device that is not here.
        UsageError: an edited setting that cannot be. In each case the pipeline is as it was.
    """
    earlier = applied_to(pipe)
    target = device or plan.machine.device
    if earlier is not None and earlier.plan == plan and earlier.device == target:
        return earlier
    _check_device(target, plan)
    with _earlier_off(pipe):
        return _applied_anew(pipe, plan, target)


@contextmanager
def _earlier_off(pipe: Any) -> Iterator[None]:
    """What vramplan had applied is off inside the block, and on again if the block fails."""
    earlier = applied_to(pipe)
    if earlier is not None:
        earlier.undo()
    try:
        yield
    except BaseException:
        if earlier is not None:
            _apply(pipe, earlier._placed, earlier._decodes, earlier.device)
            pipe.__dict__[_MARK] = earlier
        raise


def _applied_anew(pipe: Any, plan: Plan, target: str) -> Applied:
    """The plan on a pipeline that has none, checked first; the pipeline as it was if anything fails."""
    spec = spec_from_pipeline(pipe)
    check_match(spec, plan)
    refuse_hooked(spec)
    placed, decodes = parse_settings(plan, spec, _accelerator(plan, target))
    before = _Snapshot.of(pipe)
    calls = tuple(calls_of(placed, decodes, target, modules_of(pipe)))
    try:
        _apply(pipe, placed, decodes, target)
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


def parse_settings(
    plan: Plan, spec: PipelineSpec | None, accelerator: Accelerator | None
) -> tuple[list[tuple[Placement, list[str]]], list[tuple[Decode, list[str]]]]:
    """The plan's settings with the components each is for, in the order to apply them.

    With a `spec` every setting is checked against it, and refused if it cannot be.

    Raises:
        UsageError: an unknown or impossible setting, or a component without one; names the place in the plan.
    """
    placement = {name: _parsed(text, name, parse_placement) for name, text in plan.settings.placement.items()}
    decode = [_parsed(text, "decode", parse_decode) for text in plan.settings.decode]
    whole = {setting.name for setting in placement.values() if setting.whole_pipeline}
    if whole and len({setting.name for setting in placement.values()}) > 1:
        name = sorted(whole)[0]
        raise UsageError(f"settings.placement: {name} is for the whole pipeline and excludes every other placement")
    if spec is not None:
        placement = _checked(placement, spec, accelerator)
    names = [c.name for c in spec.vaes] if spec else vae_names(plan)
    return grouped(placement), [(setting, _able(setting, names, spec, plan)) for setting in decode]


def vae_names(plan: Plan) -> list[str]:
    """The components of the plan that are VAEs."""
    return [r.name for r in plan.model.components if role_of(r.name, r.library, r.class_name) == "vae"]


def calls_of(
    placed: Sequence[tuple[Placement, Sequence[str]]],
    decodes: Sequence[tuple[Decode, Sequence[str]]],
    device: str,
    modules: Mapping[str, Any],
) -> Iterable[str]:
    """The settings as lines of Python on an object called `pipe`, each import once."""
    lines = [line for decode, names in decodes for line in decode.code(names, modules)]
    lines += [line for setting, names in placed for line in setting.code(names, device)]
    return dict.fromkeys(lines)


def _parsed(text: str, where: str, parse: Any) -> Any:
    try:
        return parse(text)
    except UsageError as error:
        raise UsageError(f"settings.{'decode' if where == 'decode' else f'placement.{where}'}: {error}") from None


def _checked(
    placement: Mapping[str, Placement], spec: PipelineSpec, accelerator: Accelerator | None
) -> dict[str, Placement]:
    names = {component.name for component in spec.components}
    for name in sorted(names ^ set(placement)):
        has = "has no such component" if name in placement else "is not placed"
        raise UsageError(
            f"settings.placement.{name}: {name} {has}"
            if name in names
            else f"settings.placement.{name}: {spec.class_name} {has}"
        )
    completed = {name: setting.complete(spec.component(name)) for name, setting in placement.items()}
    for name, setting in completed.items():
        reason = setting.refusal(spec.component(name), spec, accelerator)
        if reason is not None and (accelerator is not None or setting.name != "resident"):
            raise UsageError(f"settings.placement.{name}: {reason}")
    return completed


def _able(setting: Decode, names: Sequence[str], spec: PipelineSpec | None, plan: Plan) -> list[str]:
    """The VAEs that can take the setting; refused where none can."""
    if spec is None:
        return list(names)
    reasons = {name: setting.refusal(spec.component(name), plan.workload) for name in names}
    able = [name for name, reason in reasons.items() if reason is None]
    if not able:
        reason = next(iter(reasons.values()), "the pipeline has no VAE")
        raise UsageError(f"settings.decode: {format_setting(setting)}: {reason}")
    return able


def _apply(
    pipe: Any,
    placed: Sequence[tuple[Placement, Sequence[str]]],
    decodes: Sequence[tuple[Decode, Sequence[str]]],
    device: str,
) -> None:
    for decode, names in decodes:
        decode.apply(pipe, names)
    for setting, names in placed:
        setting.apply(pipe, names, device)


def check_match(spec: PipelineSpec, plan: Plan) -> None:
    """Raises MismatchError where the plan was made for another pipeline; the message says what differs."""
    if spec.class_name != plan.model.class_name:
        raise MismatchError(f"the plan is for a {plan.model.class_name}, this is a {spec.class_name}")
    if fingerprint(spec) == plan.model.fingerprint:
        return
    planned = {record.name: record for record in plan.model.components}
    here = {component.name: component for component in spec.components}
    for name in sorted(planned.keys() | here.keys()):
        if name not in here or name not in planned:
            where = "in the plan, not in this pipeline" if name in planned else "in this pipeline, not in the plan"
            raise MismatchError(f"{name} is {where}; make the plan again")
        old, new = planned[name], here[name]
        differences = (
            (old.class_name, new.class_name),
            (old.dtype, new.dtype),
            (f"{old.weight_bytes} bytes of weights", f"{new.weight_bytes} bytes of weights"),
        )
        for before, now in differences:
            if before != now:
                raise MismatchError(f"{name}: the plan is for {before}, this pipeline has {now}; make the plan again")
    raise MismatchError("the pipeline is not the one the plan was made for; make the plan again")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    """What has to be put back: where each module was, and the settings on VAEs and pipeline."""

    modules: Mapping[str, Any]
    parameters: Sequence[tuple[Any, Mapping[str, Any]]]
    devices: Mapping[str, str]
    settings: Mapping[str, Mapping[str, Any]]
    attributes: Mapping[str, Any]

    @classmethod
    def of(cls, pipe: Any) -> _Snapshot:
        modules = modules_of(pipe)
        return cls(
            modules=modules,
            parameters=[(child, dict(child._parameters)) for module in modules.values() for child in module.modules()],
            devices={name: device_of(module) or "cpu" for name, module in modules.items()},
            settings={name: _decode_settings(module) for name, module in modules.items()},
            attributes={name: pipe.__dict__.get(name, _ABSENT) for name in _PIPE_ATTRIBUTES},
        )

    def restore(self, pipe: Any, placed: Sequence[tuple[Placement, Sequence[str]]]) -> None:
        """Hooks off in any case, whatever of the plan had been reached.

        A component that was taken out or replaced since then is left as it is.
        """
        here = modules_of(pipe)
        kept: dict[str, Any] = {name: module for name, module in self.modules.items() if here.get(name) is module}
        for setting, names in placed:
            setting.remove(pipe, [name for name in names if name in kept])
        for child, parameters in self.parameters:
            _tie_again(child, parameters)
        for name, module in kept.items():
            module.to(self.devices[name])
            vars(module).update(self.settings[name])
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


def _decode_settings(module: Any) -> dict[str, Any]:
    """The plain attributes that slicing and tiling change."""
    return {
        name: value for name, value in vars(module).items() if name.startswith(("tile_", "use_tiling", "use_slicing"))
    }
