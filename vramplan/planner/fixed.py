"""What the user set by hand: read from text, checked against the pipeline, and kept whatever else is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vramplan.errors import UsageError
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.types import PipelineSpec
from vramplan.strategies import Decode, Execution, Placement, Weights
from vramplan.strategies.settings import (
    STORED,
    UNSET,
    parse_decode,
    parse_execution,
    parse_placement,
    parse_weights,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """What the user set by hand. `everywhere` is a placement for all components; `decode` None is open, and so are
    `weights` and `attention`; nothing is compiled that is not named."""

    everywhere: Placement | None = None
    placement: Mapping[str, Placement] = field(default_factory=dict)
    decode: tuple[Decode, ...] | None = None
    weights: Mapping[str, Weights] | None = None
    attention: Mapping[str, Execution] | None = None
    compile: Mapping[str, Execution] = field(default_factory=dict)

    @property
    def execution(self) -> dict[str, tuple[Execution, ...]]:
        """Settings of attention and compiling, by component."""
        return by_component(self.attention or {}, self.compile)


def by_component(*axes: Mapping[str, Execution]) -> dict[str, tuple[Execution, ...]]:
    """The settings of several axes, by component."""
    names = dict.fromkeys(name for settings in axes for name in settings)
    return {name: tuple(settings[name] for settings in axes if name in settings) for name in names}


def parse_fixed(
    settings: Mapping[str, str | Sequence[str]], spec: PipelineSpec, accelerator: Accelerator | None = None
) -> Fixed:
    """`{"placement.transformer": "group_offload:type=leaf", "decode": ["vae_slicing"]}` as settings.

    Raises:
        UsageError: an axis or component that does not exist, or a setting that cannot stand there.
    """
    everywhere: Placement | None = None
    placement: dict[str, Placement] = {}
    decode: list[Decode] | None = None
    weights: dict[str, Weights] | None = None
    execution: dict[str, dict[str, Execution]] = {}
    for key, value in settings.items():
        axis, _, name = key.partition(".")
        texts = [value] if isinstance(value, str) else list(value)
        if axis != "decode" and len(texts) != 1:
            raise UsageError(f'`settings["{key}"]`: give one setting, not {len(texts)}')
        if key == "decode":
            decode = _decode_settings(texts)
        elif key == "placement":
            everywhere = parse_placement(texts[-1])
        elif axis == "placement" and name:
            placement[name] = _component_placement(name, texts[-1], spec)
        elif axis == "weights":
            weights = (weights or {}) | _component_weights(name, texts[-1], spec)
        elif axis in ("attention", "compile") and (name or texts[-1] == UNSET):
            execution.setdefault(axis, {}).update(_component_execution(axis, name, texts[-1], spec, accelerator))
        else:
            raise UsageError(
                f'`settings["{key}"]`: the axes are weights.COMPONENT, attention.COMPONENT, placement, '
                "placement.COMPONENT, compile.COMPONENT and decode"
            )
    if everywhere is not None and everywhere.whole_pipeline and placement:
        raise UsageError(f"{everywhere.name} is for the whole pipeline: it excludes {', '.join(placement)}")
    told = None if decode is None else tuple(decode)
    return Fixed(everywhere=everywhere, placement=placement, decode=told, weights=weights, **execution)


def _component_execution(
    axis: str, name: str, text: str, spec: PipelineSpec, accelerator: Accelerator | None
) -> dict[str, Execution]:
    """The setting for one component; `plain`, with or without a component, leaves it as it is."""
    if text == UNSET:
        return {}
    _check_name(f"{axis}.{name}", name, spec)
    setting = parse_execution(text, axis)
    reason = setting.refusal(spec.component(name), accelerator)
    if reason is not None:
        raise UsageError(f"{axis}.{name}: {reason}")
    return {name: setting}


def _component_weights(name: str, text: str, spec: PipelineSpec) -> dict[str, Weights]:
    """The setting for one component; `stored`, with or without a component, leaves weights as they are stored."""
    if text == STORED:
        return {}
    _check_name(f"weights.{name}", name, spec)
    setting = parse_weights(text)
    reason = setting.refusal(spec.component(name))
    if reason is not None:
        raise UsageError(f"weights.{name}: {reason}")
    return {name: setting}


def _component_placement(name: str, text: str, spec: PipelineSpec) -> Placement:
    _check_name(f"placement.{name}", name, spec)
    setting = parse_placement(text)
    if setting.whole_pipeline:
        raise UsageError(
            f"{setting.name} is for the whole pipeline, never for {name} alone: set placement={setting.name}"
        )
    return setting.complete(spec.component(name))


def _decode_settings(texts: Sequence[str]) -> list[Decode]:
    """The settings of the decode axis, each strategy once: two tile sizes cannot both be."""
    found = [parse_decode(text) for text in texts if text != UNSET]
    names = [setting.name for setting in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f'`settings["decode"]`: {name} is given twice')
    return found


def _check_name(where: str, name: str, spec: PipelineSpec) -> None:
    names = [component.name for component in spec.components]
    if name not in names:
        raise UsageError(f"{where}: {spec.class_name} has no {name}, only {', '.join(names)}")
