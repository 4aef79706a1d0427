"""Settings that the user fixed: read from text, checked against the pipeline, and kept by every candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vramplan.errors import UsageError
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.strategies import AXES, AxisRow, Decode, Execution, Placement, Weights
from vramplan.strategies.base import Axis
from vramplan.strategies.settings import is_stock, parse_decode, parse_placement, parse_setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """Settings that the user fixed. `everywhere` is a placement for all components; `decode` and `weights` are open if
    None, and so is every axis missing from `executions`. With `stock` all others must be stock too."""

    everywhere: Placement | None = None
    placement: Mapping[str, Placement] = field(default_factory=dict)
    decode: tuple[Decode, ...] | None = None
    weights: Mapping[str, Weights] | None = None
    executions: Mapping[Axis, Mapping[str, Execution]] = field(default_factory=dict)
    stock: bool = False

    @property
    def execution(self) -> dict[str, tuple[Execution, ...]]:
        """`executions` by component."""
        return by_component(self.executions)


def by_component(axes: Mapping[Axis, Mapping[str, Execution]]) -> dict[str, tuple[Execution, ...]]:
    """Regroup the settings of several axes by component."""
    several = [axes[axis] for axis in AXES if axis in axes]
    names = dict.fromkeys(name for settings in several for name in settings)
    return {name: tuple(settings[name] for settings in several if name in settings) for name in names}


def parse_fixed(
    settings: Mapping[str, str | Sequence[str]],
    spec: PipelineSpec,
    accelerator: Accelerator | None = None,
    *,
    stock: bool = False,
) -> Fixed:
    """Parse settings such as `{"placement.transformer": "group_offload:type=leaf", "decode": ["vae_slicing"]}`.

    Raises:
        UsageError: an unknown axis or component, an impossible setting, or with `stock` one that is not stock.
    """
    everywhere: Placement | None = None
    given: dict[Axis, Any] = {}
    for key, value in settings.items():
        texts = [value] if isinstance(value, str) else list(value)
        row, name = _axis_and_component(key, texts)
        other = next((text for text in texts if stock and not is_stock(row.name, text)), None)
        if other is not None:
            raise UsageError(f'`settings["{key}"]`: {not_stock(other)}')
        if not row.by_component:
            given[row.name] = _decode_settings(texts)
        elif not name and not row.nothing:
            everywhere = parse_placement(texts[-1])
        else:
            given.setdefault(row.name, {}).update(_component_setting(row, name, texts[-1], spec, accelerator))
    if everywhere is not None and everywhere.whole_pipeline and "placement" in given:
        raise UsageError(f"{everywhere.name} is for the whole pipeline: it excludes {', '.join(given['placement'])}")
    executions = {axis: given.pop(axis) for axis in AXES if axis in given and AXES[axis].kind is Execution}
    return Fixed(everywhere=everywhere, executions=executions, stock=stock, **given)


def check_settings(settings: Mapping[str, Sequence[str]]) -> None:
    """Raise UsageError for what is a mistake for any pipeline: an unknown axis, strategy, option or value."""
    for key, texts in settings.items():
        row, _ = _axis_and_component(key, texts)
        for text in texts:
            if text != row.nothing:
                parse_setting(row.name, text)


def not_stock(setting: str) -> str:
    """Return the sentence that refuses a setting that is not stock."""
    return f"{setting.partition(':')[0]} is vramplan's own, and `stock` leaves only diffusers' and accelerate's"


def refusal_of(setting: Weights | Execution, component: Component, accelerator: Accelerator | None) -> str | None:
    """Return a sentence on why the component cannot take the setting; None if it can."""
    if isinstance(setting, Execution):
        return setting.refusal(component, accelerator)
    return setting.refusal(component)


def _axis_and_component(key: str, texts: Sequence[str]) -> tuple[AxisRow, str]:
    """Return the axis and the component of `AXIS.COMPONENT`; the component is empty if not named."""
    axis, _, name = key.partition(".")
    row = AXES.get(axis)
    if len(texts) != 1 and (row is None or row.by_component):
        raise UsageError(f'`settings["{key}"]`: give one setting, not {len(texts)}')
    if row is None or not row.takes(key, texts[-1] if texts else ""):
        axes = sorted(AXES.values(), key=lambda row: (not row.by_component, row.order))
        *first, last = (word for row in axes for word in row.keys)
        raise UsageError(f'`settings["{key}"]`: the axes are {", ".join(first)} and {last}')
    return row, name


def _component_setting(
    row: AxisRow, name: str, text: str, spec: PipelineSpec, accelerator: Accelerator | None
) -> dict[str, Any]:
    """Return the setting by component; empty for the axis's word for no setting, with or without a component."""
    if row.nothing and text == row.nothing:
        return {}
    names = [component.name for component in spec.components]
    if name not in names:
        raise UsageError(f"{row.name}.{name}: {spec.class_name} has no {name}, only {', '.join(names)}")
    component, setting = spec.component(name), parse_setting(row.name, text)
    if isinstance(setting, Placement):
        return {name: _component_placement(setting, component)}
    reason = refusal_of(setting, component, accelerator)
    if reason is not None:
        raise UsageError(f"{row.name}.{name}: {reason}")
    return {name: setting}


def _component_placement(setting: Placement, component: Component) -> Placement:
    if setting.whole_pipeline:
        raise UsageError(
            f"{setting.name} is for the whole pipeline, never for {component.name} alone: set placement={setting.name}"
        )
    return setting.complete(component)


def _decode_settings(texts: Sequence[str]) -> tuple[Decode, ...]:
    """Parse the settings of the decode axis, of which each strategy may appear once."""
    found = tuple(parse_decode(text) for text in texts if text != AXES["decode"].nothing)
    names = [setting.name for setting in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f'`settings["decode"]`: {name} is given twice')
    return found
