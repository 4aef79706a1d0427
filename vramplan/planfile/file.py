"""Write a plan as readable YAML, and read it strictly."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vramplan.common.yaml import _MOST_CHARACTERS, read_plain_yaml, validation_message
from vramplan.errors import UsageError, VramplanError
from vramplan.planfile.types import SCHEMA_VERSION, Plan
from vramplan.units import format_bytes
from vramplan.workload import make_workload

_BYTES_LINE = re.compile(r"^(\s*(?:- )?\w+_bytes: )(-?\d+)$", re.MULTILINE)
_READ = (1, SCHEMA_VERSION)  # what 2 added has defaults
_HEADER = """\
# A vramplan plan: how to run this pipeline within this memory. `vramplan apply` makes it so.
# The settings may be edited; what cannot work is refused with the reason.
"""


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Convert the plan to plain mappings, lists, numbers and text."""
    return asdict(plan)


def dump_plan(plan: Plan) -> str:
    """Format the plan as YAML, with one line for the stock plan and each candidate, and sizes in GiB as comments."""
    import yaml

    content = _plain(plan_to_dict(plan))
    stock, candidates = content.pop("stock"), content.pop("candidates")
    text = yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True)
    text = _BYTES_LINE.sub(lambda match: f"{match[0]}  # {format_bytes(int(match[2]))}", text)

    def line(value: Any) -> str:
        return yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=1 << 20, allow_unicode=True)

    text += f"stock: {line(stock)}" if stock else ""
    return _HEADER + text + ("candidates:\n" + "".join(f"- {line(item)}" for item in candidates) if candidates else "")


def parse_plan(text: str, *, name: str = "plan") -> Plan:
    """Parse a plan from YAML text. Only plain YAML is read: no tag can run code.

    Raises:
        VramplanError: not YAML, another schema, an unknown key or a wrong type; the message names the place.
    """
    from pydantic import TypeAdapter, ValidationError

    content = read_plain_yaml(text, name)
    _check_schema(content, name)
    content["schema_version"] = SCHEMA_VERSION
    try:
        plan = TypeAdapter(Plan).validate_json(json.dumps(content, default=str), strict=True)
        make_workload({}, asdict(plan.workload))
    except ValidationError as error:
        raise VramplanError(f"{name}: {validation_message(error)}") from error
    except UsageError as error:
        raise VramplanError(f"{name}: workload.{error}") from error
    except (TypeError, ValueError) as error:
        raise VramplanError(f"{name}: not a plan ({error})") from error
    return plan


def load_plan(path: str | Path) -> Plan:
    """Read a plan from a file. Raises VramplanError if it cannot be read or is not a plan."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise VramplanError(f"{path}: cannot be read ({reason}); make one with `vramplan.dump_plan`") from error
    return parse_plan(text, name=str(path))


def _check_schema(content: Any, name: str) -> None:
    if not isinstance(content, dict):
        raise VramplanError(f"{name}: not a plan (expected a mapping, found {type(content).__name__})")
    if "accelerators" in content and "host" in content:
        raise VramplanError(f'{name}: a machine, not a plan: `vramplan.plan` with `device="{name}"` plans for it')
    version = content.get("schema_version")
    if version is None:
        raise VramplanError(f"{name}: schema_version is missing: not a plan")
    if type(version) is not int or version not in _READ:
        reads = " and ".join(map(str, _READ))
        raise VramplanError(f"{name}: schema_version {version!r}; this vramplan reads {reads}: make the plan again")


def _plain(value: Any, name: str = "") -> Any:
    """Convert tuples to lists, and round seconds to four digits."""
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) and "seconds" in name else value
