"""A decision's settings as a plan keeps them."""

from __future__ import annotations

from vramplan.planfile import Settings
from vramplan.planner.decide import Decision
from vramplan.strategies.base import Axis
from vramplan.strategies.settings import format_setting


def settings_of(decision: Decision) -> Settings:
    """The settings as text, by axis and component."""
    return Settings(
        placement={name: format_setting(setting) for name, setting in decision.placement.items()},
        decode=tuple(map(format_setting, decision.decode)),
        weights={name: format_setting(setting) for name, setting in decision.weights.items()},
        attention=_on_axis(decision, "attention"),
        compile=_on_axis(decision, "compile"),
    )


def _on_axis(decision: Decision, axis: Axis) -> dict[str, str]:
    return {
        name: format_setting(setting)
        for name, settings in decision.execution.items()
        for setting in settings
        if setting.axis == axis
    }
