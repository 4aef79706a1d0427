"""Check a plan's settings against the pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vramplan.errors import MismatchError, UsageError
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.component import role_of
from vramplan.pipeline.quantization import mark_quantized
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.planfile.types import Plan, fingerprint
from vramplan.planner.fixed import by_component, refusal_of
from vramplan.strategies import AXES, AxisRow
from vramplan.strategies.base import Axis, Decode, Decodes, Execution, Placed, Placement, Weights, half_freed
from vramplan.strategies.settings import format_setting, grouped, parse_setting


def check_match(spec: PipelineSpec, plan: Plan) -> None:
    """Raise MismatchError if the plan was made for another pipeline; the message names the difference."""
    if spec.class_name != plan.model.class_name:
        raise MismatchError(f"the plan is for a {plan.model.class_name}, this is a {spec.class_name}")
    if fingerprint(spec) == plan.model.fingerprint:
        return
    planned = {record.name: record for record in plan.model.components}
    here = {component.name: component for component in spec.components}
    weights = _by_component(AXES["weights"], plan)
    loaded = {name for name, setting in weights.items() if name in here and _already_applied(setting, here[name])}
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
        for before, now in differences[:1] if name in loaded else differences:
            if before != now:
                raise MismatchError(f"{name}: the plan is for {before}, this pipeline has {now}; make the plan again")
    if not loaded:
        raise MismatchError("the pipeline is not the one the plan was made for; make the plan again")


def _already_applied(setting: Weights, component: Component) -> bool:
    """Whether a component already has the form of a weights setting; for a setting with a file, any of that library."""
    return bool(setting.quantized) and f"{component.quantized} ".startswith(f"{setting.quantized} ")


def parse_settings(
    plan: Plan, spec: PipelineSpec | None, accelerator: Accelerator | None
) -> tuple[list[tuple[Weights | Placement | Execution, list[str]]], list[tuple[Decode, list[str]]]]:
    """Return the plan's settings with their components, in the order to apply them, checked against `spec` if given.

    Raises:
        UsageError: an unknown or impossible setting, or a component without one; names the place in the plan.
    """
    given = {axis: _by_component(row, plan) for axis, row in AXES.items() if row.by_component}
    executions = {axis: given[axis] for axis in given if AXES[axis].kind is Execution}
    placement, weights = given["placement"], given["weights"]
    decode = [_parsed("decode", text) for text in plan.settings.decode]
    whole = {setting.name for setting in placement.values() if setting.whole_pipeline}
    if whole and len({setting.name for setting in placement.values()}) > 1:
        name = sorted(whole)[0]
        raise UsageError(f"settings.placement: {name} is for the whole pipeline and excludes every other placement")
    names = [c.name for c in spec.vaes] if spec else vae_names(plan)
    if spec is None:
        _check_names(plan, given)
    else:
        here = {component.name: component for component in spec.components}
        done = [name for name, setting in weights.items() if name in here and _already_applied(setting, here[name])]
        weights = {name: setting for name, setting in weights.items() if name not in done}
        _check("weights", weights, spec, accelerator)
        placement = _checked_placement(placement, _with_weights(spec, weights), accelerator)
        for axis, settings in executions.items():
            _check(axis, settings, spec, accelerator, placement)
    return grouped(placement, weights, by_component(executions)), [
        (setting, _vaes_for(setting, names, spec, plan)) for setting in decode
    ]


def _check_names(plan: Plan, given: Mapping[Axis, Mapping[str, Any]]) -> None:
    """Raise UsageError if a setting names no component of the plan, or a component of it is not placed."""
    names = {record.name for record in plan.model.components}
    for axis, settings in given.items():
        for name in sorted(settings.keys() - names):
            raise UsageError(f"settings.{axis}.{name}: {plan.model.class_name} has no such component")
    for name in sorted(names - given["placement"].keys()):
        raise UsageError(f"settings.placement.{name}: {name} is not placed")


def vae_names(plan: Plan) -> list[str]:
    """Return the names of the plan's VAEs."""
    return [r.name for r in plan.model.components if role_of(r.name, r.library, r.class_name) == "vae"]


def calls_of(placed: Placed, decodes: Decodes, device: str, modules: Mapping[str, Any]) -> Iterable[str]:
    """Return the settings as lines of Python on an object called `pipe`, each line once."""
    lines = [line for decode, names in decodes for line in decode.code(names, modules)]
    lines += [line for setting, names in placed for line in setting.code(names, device)]
    return dict.fromkeys(lines)


def _parsed(axis: Axis, text: str, component: str | None = None) -> Any:
    try:
        return parse_setting(axis, text)
    except UsageError as error:
        raise UsageError(f"settings.{'.'.join(filter(None, (axis, component)))}: {error}") from None


def _by_component(row: AxisRow, plan: Plan) -> dict[str, Any]:
    """Parse the plan's settings on an axis."""
    return {name: _parsed(row.name, text, name) for name, text in getattr(plan.settings, row.name).items()}


def _check(
    axis: Axis,
    settings: Mapping[str, Any],
    spec: PipelineSpec,
    accelerator: Accelerator | None,
    placement: Mapping[str, Placement] | None = None,
) -> None:
    """Raise UsageError if a component cannot take its setting, alone or with its placement."""
    here = {component.name: component for component in spec.components}
    for name, setting in settings.items():
        reason: str | None = f"{spec.class_name} has no such component"
        if name in here:
            conflict = setting.conflict_with(placement[name]) if placement else None
            reason = refusal_of(setting, here[name], accelerator) or conflict
        if reason is not None:
            raise UsageError(f"settings.{axis}.{name}: {reason}")


def _with_weights(spec: PipelineSpec, weights: Mapping[str, Weights]) -> PipelineSpec:
    """Return the spec under these settings, as far as placements depend on it."""
    kinds = {name: setting.quantized for name, setting in weights.items()}
    return replace(spec, components=tuple(mark_quantized(part, kinds.get(part.name, "")) for part in spec.components))


def _checked_placement(
    placement: Mapping[str, Placement], spec: PipelineSpec, accelerator: Accelerator | None
) -> dict[str, Placement]:
    names = {component.name for component in spec.components}
    for name in sorted(names ^ set(placement)):
        reason = f"{name} is not placed" if name in names else f"{spec.class_name} has no such component"
        raise UsageError(f"settings.placement.{name}: {reason}")
    completed = {name: setting.complete(spec.component(name)) for name, setting in placement.items()}
    if (partial := half_freed(completed, spec.components)) is not None:
        (one, other), setting_name = partial
        raise UsageError(f"settings.placement.{one}: {setting_name} must be on {other} too, or on neither")
    for name, setting in completed.items():
        refusal = setting.refusal(spec.component(name), spec, accelerator)
        if refusal is not None and (accelerator is not None or setting.name != "resident"):
            raise UsageError(f"settings.placement.{name}: {refusal}")
    return completed


def _vaes_for(setting: Decode, names: Sequence[str], spec: PipelineSpec | None, plan: Plan) -> list[str]:
    """Return the VAEs that can take the setting. Raises UsageError if none can."""
    if spec is None:
        return list(names)
    reasons = {name: setting.refusal(spec.component(name), plan.workload) for name in names}
    able = [name for name, reason in reasons.items() if reason is None]
    if not able:
        reason = next(iter(reasons.values()), "the pipeline has no VAE")
        raise UsageError(f"settings.decode: {format_setting(setting)}: {reason}")
    return able
