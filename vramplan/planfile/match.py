"""A plan's settings, held against the pipeline they are for."""

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
    """Raises MismatchError where the plan was made for another pipeline; the message says what differs."""
    if spec.class_name != plan.model.class_name:
        raise MismatchError(f"the plan is for a {plan.model.class_name}, this is a {spec.class_name}")
    if fingerprint(spec) == plan.model.fingerprint:
        return
    planned = {record.name: record for record in plan.model.components}
    here = {component.name: component for component in spec.components}
    weights = _by_component(AXES["weights"], plan)
    loaded = {name for name, setting in weights.items() if name in here and _is_so(setting, here[name])}
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


def _is_so(setting: Weights, component: Component) -> bool:
    """Whether a component already has the form that a setting of weights would give it.

    Where that depends on a file, any form of its library's.
    """
    return bool(setting.quantized) and f"{component.quantized} ".startswith(f"{setting.quantized} ")


def parse_settings(
    plan: Plan, spec: PipelineSpec | None, accelerator: Accelerator | None
) -> tuple[list[tuple[Weights | Placement | Execution, list[str]]], list[tuple[Decode, list[str]]]]:
    """The plan's settings with the components each is for, in the order to apply them.

    With a `spec` every setting is checked against it, and refused if it cannot be.

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
    if spec is not None:
        there = {component.name: component for component in spec.components}
        weights = {
            name: setting for name, setting in weights.items() if name not in there or not _is_so(setting, there[name])
        }
        _check("weights", weights, spec, accelerator)
        placement = _checked(placement, _under(spec, weights), accelerator)
        for axis, settings in executions.items():
            _check(axis, settings, spec, accelerator, placement)
    return grouped(placement, weights, by_component(executions)), [
        (setting, _able(setting, names, spec, plan)) for setting in decode
    ]


def vae_names(plan: Plan) -> list[str]:
    """The components of the plan that are VAEs."""
    return [r.name for r in plan.model.components if role_of(r.name, r.library, r.class_name) == "vae"]


def calls_of(placed: Placed, decodes: Decodes, device: str, modules: Mapping[str, Any]) -> Iterable[str]:
    """The settings as lines of Python on an object called `pipe`, each import once."""
    lines = [line for decode, names in decodes for line in decode.code(names, modules)]
    lines += [line for setting, names in placed for line in setting.code(names, device)]
    return dict.fromkeys(lines)


def _parsed(axis: Axis, text: str, component: str | None = None) -> Any:
    try:
        return parse_setting(axis, text)
    except UsageError as error:
        raise UsageError(f"settings.{'.'.join(filter(None, (axis, component)))}: {error}") from None


def _by_component(row: AxisRow, plan: Plan) -> dict[str, Any]:
    """The plan's settings on an axis, read."""
    return {name: _parsed(row.name, text, name) for name, text in getattr(plan.settings, row.name).items()}


def _check(
    axis: Axis,
    settings: Mapping[str, Any],
    spec: PipelineSpec,
    accelerator: Accelerator | None,
    placement: Mapping[str, Placement] | None = None,
) -> None:
    """Raises UsageError where a component cannot take its setting, or cannot under its placement."""
    there = {component.name: component for component in spec.components}
    for name, setting in settings.items():
        reason: str | None = f"{spec.class_name} has no such component"
        if name in there:
            conflict = setting.conflict_with(placement[name]) if placement else None
            reason = refusal_of(setting, there[name], accelerator) or conflict
        if reason is not None:
            raise UsageError(f"settings.{axis}.{name}: {reason}")


def _under(spec: PipelineSpec, weights: Mapping[str, Weights]) -> PipelineSpec:
    """The pipeline once these settings are on it, as far as placements ask."""
    kinds = {name: setting.quantized for name, setting in weights.items()}
    return replace(spec, components=tuple(mark_quantized(part, kinds.get(part.name, "")) for part in spec.components))


def _checked(
    placement: Mapping[str, Placement], spec: PipelineSpec, accelerator: Accelerator | None
) -> dict[str, Placement]:
    names = {component.name for component in spec.components}
    for name in sorted(names ^ set(placement)):
        told = f"{name} is not placed" if name in names else f"{spec.class_name} has no such component"
        raise UsageError(f"settings.placement.{name}: {told}")
    completed = {name: setting.complete(spec.component(name)) for name, setting in placement.items()}
    torn = half_freed(completed, spec.components)
    if torn is not None:
        (one, other), setting_name = torn
        raise UsageError(f"settings.placement.{one}: {setting_name} must be on {other} too, or on neither")
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
