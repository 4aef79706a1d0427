"""Settings as text: `group_offload:type=block,blocks=2`, in plan files and in the settings that a user fixes.

A file name may contain commas, equals signs and spaces: it is the last option and takes the rest of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vramplan.errors import UsageError
from vramplan.strategies import AXES, Decode, Execution, Placement, Weights
from vramplan.strategies.base import Axis, FileName

# Strategies that plans of earlier versions name, and what took their place.
REPLACED = {"partial_residency": "weight_streaming"}


def format_setting(setting: Weights | Placement | Decode | Execution) -> str:
    """Format a setting as text, without options at their default."""
    options = [
        f"{field.name}={_format_value(getattr(setting, field.name))}"
        for field in fields(setting)  # type: ignore[arg-type]
        if getattr(setting, field.name) != field.default
    ]
    return setting.name + (":" + ",".join(options) if options else "")


def parse_setting(axis: Axis, text: str) -> Any:
    """Parse a setting of the axis. Raises UsageError for an unknown strategy, option or value."""
    known = {cls.name: cls for cls in AXES[axis].strategies}
    name, _, rest = text.partition(":")
    cls = known.get(name.strip())
    if cls is None and name.strip() in REPLACED:
        raise UsageError(f"{name.strip()!r} was replaced by {REPLACED[name.strip()]}: make a new plan")
    if cls is None:
        near = get_close_matches(name.strip(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
        raise UsageError(f"{name.strip()!r} is not a strategy here: {hint}")
    return cls(**_options(cls, rest))


parse_placement: Callable[[str], Placement] = partial(parse_setting, "placement")
parse_decode: Callable[[str], Decode] = partial(parse_setting, "decode")


def is_stock(axis: Axis, text: str) -> bool:
    """Whether a setting of the axis is stock; the word for no setting is."""
    name = text.partition(":")[0].strip()
    return all(cls.stock for cls in AXES[axis].strategies if cls.name == name)


def grouped(
    placement: Mapping[str, Placement],
    weights: Mapping[str, Weights] | None = None,
    execution: Mapping[str, Sequence[Execution]] | None = None,
) -> list[tuple[Weights | Placement | Execution, list[str]]]:
    """Group equal settings with their components, in the order to apply them.

    Weights come first, because hooks refer to them; then attention; then placements, resident last, because `to` skips
    the groups of a hooked pipeline; compiling comes last.
    """
    groups: dict[Weights | Placement | Execution, list[str]] = {}
    settings: list[tuple[str, Weights | Placement | Execution]] = [*(weights or {}).items(), *placement.items()]
    settings += [(name, setting) for name, several in (execution or {}).items() for setting in several]
    for name, setting in settings:
        groups.setdefault(setting, []).append(name)
    return sorted(groups.items(), key=lambda item: (AXES[item[0].axis].order, item[0].name == "resident"))


def _options(cls: Any, text: str) -> dict[str, Any]:
    """Parse the options of a setting."""
    hints, names = get_type_hints(cls), [field.name for field in fields(cls)]
    options: dict[str, Any] = {}
    for part in _parts(text, {key for key, kind in hints.items() if kind is FileName}):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals and key in names:
            raise UsageError(f"{cls.name}: {key} needs a value: write {key}=VALUE")
        if key not in names:
            raise UsageError(f"{cls.name} has no option {key!r}; its options are: {', '.join(names) or 'none'}")
        options[key] = _parse_value(hints[key], value, f"{cls.name}:{key}")
    return options


def _parts(text: str, files: set[str]) -> Iterator[str]:
    """Yield the options; a file name takes the rest of the text."""
    while text.strip():
        part, _, rest = text.partition(",")
        if part.partition("=")[0].strip() in files:
            part, rest = text, ""
        if part.strip():
            yield part
        text = rest


def _parse_value(kind: Any, text: str, where: str) -> Any:
    if kind is FileName:
        return text
    text = text.strip()
    if get_origin(kind) is Literal:
        if text in get_args(kind):
            return text
        raise UsageError(f"{where}={text}: use one of {', '.join(get_args(kind))}")
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UsageError(f"{where}={text}: use true or false")
    if kind is int:
        try:
            return int(text)
        except ValueError:
            raise UsageError(f"{where}={text}: a whole number is needed") from None
    return text


def _format_value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
