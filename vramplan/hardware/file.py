"""Strict loading of machine files: machines written by `detect -o`, to plan for them elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vramplan.errors import VramplanError
from vramplan.hardware.types import Hardware

MACHINE_SCHEMA_VERSION = 1


def is_hardware_file(device: str) -> bool:
    """Whether the name is a file's, by its suffix: profiles and torch devices have none."""
    return Path(device).suffix.lower() in (".yaml", ".yml", ".json")


def load_hardware(path: str | Path) -> Hardware:
    """Load the machine in the file. Its budget is ignored, and computed again.

    Raises:
        VramplanError: not readable, not YAML, another schema, an unknown key, a wrong type, or an impossible number;
            the message says where.
    """
    from pydantic import TypeAdapter, ValidationError

    from vramplan.common.yaml import read_plain_yaml, validation_message

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise VramplanError(f"{path}: cannot be read ({reason}); write one with `vramplan detect`") from error
    content = read_plain_yaml(text, str(path))
    if isinstance(content, dict) and "settings" in content:
        raise VramplanError(f"{path}: a plan, not a machine: `vramplan detect` writes a machine")
    if not isinstance(content, dict) or content.get("schema_version") != MACHINE_SCHEMA_VERSION:
        raise VramplanError(f"{path}: no machine of this version: write it again with `vramplan detect`")
    facts = {key: value for key, value in content.items() if key not in ("schema_version", "budget")}
    try:
        found = TypeAdapter(Hardware).validate_json(json.dumps(facts, default=str), strict=True)
    except ValidationError as error:
        raise VramplanError(f"{path}: {validation_message(error)}") from error
    except (TypeError, ValueError) as error:
        raise VramplanError(f"{path}: not a machine ({error})") from error
    wrong = next(_implausible(found), None)
    if wrong is not None:
        raise VramplanError(f"{path}: {wrong}; correct the file, or write it again with `vramplan detect`")
    return found


def _implausible(hardware: Hardware) -> Iterator[str]:
    """Impossible facts, each with its place in the file: files are edited by hand, and plans depend on them."""
    yield from _invalid_numbers(asdict(hardware), "")
    host = hardware.host
    if host.available_bytes > host.total_bytes:
        yield "host.available_bytes: more than host.total_bytes"
    names = set()
    for place, card in enumerate(hardware.accelerators):
        if not card.total_bytes:
            yield f"accelerators.{place}.total_bytes: a device without memory"
        if card.free_bytes is not None and card.free_bytes > card.total_bytes:
            yield f"accelerators.{place}.free_bytes: more than its total_bytes"
        if card.device in names:
            yield f"accelerators.{place}.index: {card.device} is there already"
        names.add(card.device)


def _invalid_numbers(value: Any, place: str) -> Iterator[str]:
    """Numbers that no size, rate or count can be: below 0, not finite, and rates of 0."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _invalid_numbers(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from _invalid_numbers(item, f"{place}.{position}")
    elif isinstance(value, int | float) and not (
        math.isfinite(value) and (value > 0 or (value == 0 and not place.endswith("_per_s")))
    ):
        yield f"{place}: {value} is no size, rate or count"
