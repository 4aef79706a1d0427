"""hardware.yaml: a machine written down by `detect -o`, to plan for it elsewhere. Loaded strictly."""

from __future__ import annotations

import json
from pathlib import Path

from vramplan.errors import VramplanError
from vramplan.hardware.types import Hardware

SCHEMA_VERSION = 1


def is_hardware_file(device: str) -> bool:
    """Whether a device is named by a file: by its ending, as profiles and torch devices have none."""
    return Path(device).suffix.lower() in (".yaml", ".yml", ".json")


def load_hardware(path: str | Path) -> Hardware:
    """The machine in the file. What may be used of it is not taken from there: it is worked out anew.

    Raises:
        VramplanError: not readable, no YAML, another schema, an unknown key or a wrong type; the message says where.
    """
    from pydantic import TypeAdapter, ValidationError

    from vramplan.planfile import read_plain_yaml, validation_message

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise VramplanError(f"{path}: cannot be read ({reason}); write one with vramplan detect -o {path}") from error
    content = read_plain_yaml(text, str(path))
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise VramplanError(f"{path}: no machine of this version: write it again with vramplan detect -o {path}")
    facts = {key: value for key, value in content.items() if key not in ("schema_version", "budget")}
    try:
        return TypeAdapter(Hardware).validate_json(json.dumps(facts, default=str), strict=True)
    except ValidationError as error:
        raise VramplanError(f"{path}: {validation_message(error)}") from error
    except (TypeError, ValueError) as error:
        raise VramplanError(f"{path}: not a machine ({error})") from error
