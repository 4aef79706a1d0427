"""The table of axes, and what must agree with it."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import pytest

from tests.support.specs import card, text_to_image
from vramplan.errors import UsageError
from vramplan.planfile.record import settings_of
from vramplan.planfile.types import Settings, settings_text
from vramplan.planner.decision import Decision
from vramplan.planner.fixed import Fixed, parse_fixed
from vramplan.strategies import AXES, EXECUTIONS, REGISTRY, AxisRow, Execution
from vramplan.strategies.settings import format_setting, grouped, parse_setting

ROWS = tuple(AXES.values())
SPEC = text_to_image()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_whole(row: AxisRow) -> None:
    assert AXES[row.name] is row
    assert row.strategies
    assert row.question
    assert not row.question.endswith(".")
    for cls in row.strategies:
        assert isinstance(cls(), row.kind)
        assert cls.name != row.nothing


def test_every_strategy_is_on_exactly_one_axis() -> None:
    for cls in REGISTRY:
        assert [row.name for row in ROWS if cls in row.strategies] == [cls.axis]
    assert len(REGISTRY) == len(set(REGISTRY)) == sum(len(row.strategies) for row in ROWS)
    assert {cls.axis for cls in EXECUTIONS} == {"attention", "compile"}


def test_axes_are_applied_one_after_another() -> None:
    in_order = sorted(ROWS, key=lambda row: row.order)
    assert [row.name for row in in_order] == ["decode", "weights", "attention", "placement", "compile"]
    assert len({row.order for row in ROWS}) == len(ROWS)


def test_settings_of_a_plan_have_a_field_for_each_axis() -> None:
    assert {field.name for field in fields(Settings)} == set(AXES)
    for field in fields(Settings):
        row = AXES[field.name]
        needed = field.default is MISSING and field.default_factory is MISSING
        assert needed == (row.nothing == "")
        assert str(field.type).startswith("Mapping[") == row.by_component


def test_what_is_fixed_by_hand_has_a_place_for_each_axis() -> None:
    places = {field.name for field in fields(Fixed)}
    assert places - {"everywhere", "executions", "stock"} == {row.name for row in ROWS if row.kind is not Execution}


@pytest.mark.parametrize("cls", REGISTRY)
def test_a_setting_goes_through_text_and_the_plan(cls: Any) -> None:
    setting, row = cls(), AXES[cls.axis]
    text = format_setting(setting)
    assert parse_setting(row.name, text) == setting
    decision: dict[str, Any] = {"placement": {}, "decode": ()}
    if not row.by_component:
        decision["decode"] = (setting,)
    elif row.kind is Execution:
        decision["execution"] = {"vae": (setting,)}
    else:
        decision[row.name] = {"vae": setting}
    made = Decision(**decision, demand=None, verdict="fits", reason="", deficit_bytes=0)  # type: ignore[arg-type]
    written = settings_of(made)
    assert getattr(written, row.name) == ({"vae": text} if row.by_component else (text,))
    assert [name for name in AXES if getattr(written, name)] == [row.name]
    assert text in settings_text(written)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_strategy_of_another_axis_is_refused(row: AxisRow) -> None:
    for cls in REGISTRY:
        if cls.axis != row.name:
            with pytest.raises(UsageError, match="is not a strategy here"):
                parse_setting(row.name, cls.name)


@pytest.mark.parametrize("row", [row for row in ROWS if row.nothing], ids=lambda row: row.name)
def test_nothing_closes_an_axis(row: AxisRow) -> None:
    fixed = parse_fixed({row.name: str(row.nothing)}, SPEC, card())
    closed = fixed.executions.get(row.name) if row.kind is Execution else getattr(fixed, row.name)
    assert closed is not None
    assert not closed


@pytest.mark.parametrize(
    ("key", "text", "can_be"),
    [
        ("weights.vae", "x", True), ("weights", "x", False), ("weights", "stored", True), ("weights.", "stored", True),
        ("placement.vae", "x", True), ("placement", "x", True), ("placement.", "x", False), ("placement.", "", False),
        ("decode", "x", True), ("decode", "plain", True), ("decode.vae", "x", False), ("decode.", "plain", False),
        ("attention.vae", "x", True), ("attention", "x", False), ("attention", "plain", True),
    ],
)  # fmt: skip
def test_where_a_setting_can_stand(key: str, text: str, can_be: bool) -> None:
    assert AXES[key.partition(".")[0]].takes(key, text) is can_be


def test_axes_are_named_in_one_line() -> None:
    with pytest.raises(UsageError) as error:
        parse_fixed({"nowhere": "plain"}, SPEC)
    keys = "weights.COMPONENT, attention.COMPONENT, placement, placement.COMPONENT, compile.COMPONENT and decode"
    assert str(error.value).endswith(f"the axes are {keys}")


def test_settings_of_all_axes_of_components_are_grouped_in_order() -> None:
    settings = {row.name: row.strategies[0]() for row in ROWS if row.by_component}
    execution = {"vae": tuple(settings[row.name] for row in ROWS if row.kind is Execution)}
    placed = grouped({"vae": settings["placement"]}, {"vae": settings["weights"]}, execution)
    assert [setting.axis for setting, _ in placed] == ["weights", "attention", "placement", "compile"]
