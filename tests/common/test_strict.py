"""An unknown key is refused at every level of whatever is read from a file: the root's configuration holds below it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from vramplan.hardware.types import Hardware, Measurement
from vramplan.planfile.file import load_plan
from vramplan.planfile.types import Plan
from vramplan.profiles.catalogue import DeviceProfile, PipelineProfile
from vramplan.simulator.types import Simulation

ROOTS = (Plan, Hardware, PipelineProfile, DeviceProfile, Measurement, Simulation)
PLAN = Path(__file__).parent.parent / "view" / "snapshots" / "plan.yaml"


def dataclass_schemas(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        if schema.get("type") == "dataclass":
            yield schema
        schema = list(schema.values())
    for item in schema if isinstance(schema, list | tuple) else ():
        yield from dataclass_schemas(item)


@pytest.mark.parametrize("root", ROOTS)
def test_every_level_of_it_refuses_what_it_does_not_know(root: type) -> None:
    found = {item["cls"].__name__: item["config"] for item in dataclass_schemas(TypeAdapter(root).core_schema)}
    assert root.__name__ in found
    assert {name: config.get("extra_fields_behavior") for name, config in found.items()} == dict.fromkeys(
        found, "forbid"
    )


def levels(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of dataclasses in a value, each as the keys that lead to it."""
    if is_dataclass(value):
        yield place
        inner: Any = ((item.name, getattr(value, item.name)) for item in fields(value))
    else:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    for key, item in inner:
        yield from levels(item, (*place, key))


def test_a_plan_with_a_key_too_many_anywhere_is_refused() -> None:
    places = set(levels(load_plan(PLAN)))
    assert len(places) > 20
    for place in places:
        content = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
        level = content
        for key in place:
            level = level[key]
        level["unheard_of"] = 1
        with pytest.raises(ValidationError, match="unheard_of"):
            TypeAdapter(Plan).validate_python(content)
