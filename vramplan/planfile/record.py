"""Record the outcome of planning as a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from vramplan._version import __version__
from vramplan.pipeline.types import PipelineSpec
from vramplan.planfile.types import (
    SCHEMA_VERSION,
    ComponentRecord,
    Considered,
    MachineRecord,
    ModelRecord,
    Plan,
    Preferences,
    Projected,
    Settings,
    fingerprint,
)
from vramplan.planner.candidates import Refused
from vramplan.planner.decision import Decision, Outcome
from vramplan.planner.demand import Demand
from vramplan.strategies import AXES, AxisRow, Execution
from vramplan.strategies.settings import format_setting
from vramplan.workload import Workload


def settings_of(decision: Decision) -> Settings:
    """Return the settings as text, by axis and component."""
    return Settings(**{row.name: _texts(decision, row) for row in AXES.values()})


def _texts(decision: Decision, row: AxisRow) -> Any:
    if not row.by_component:
        return tuple(map(format_setting, getattr(decision, row.name)))
    if row.kind is Execution:
        pairs = ((name, setting) for name, several in decision.execution.items() for setting in several)
        return {name: format_setting(setting) for name, setting in pairs if setting.axis == row.name}
    return {name: format_setting(setting) for name, setting in getattr(decision, row.name).items()}


def plan_record(
    spec: PipelineSpec,
    work: Workload,
    machine: MachineRecord,
    outcome: Outcome,
    notes: tuple[str, ...],
    asked: Preferences,
) -> Plan:
    """Return the outcome as a plan."""
    chosen = outcome.chosen
    unknown = [setting.unknown for settings in chosen.execution.values() for setting in settings]
    return Plan(
        schema_version=SCHEMA_VERSION,
        vramplan_version=__version__,
        model=_model_record(spec),
        workload=work,
        machine=machine,
        asked=asked,
        settings=settings_of(chosen),
        quality=chosen.quality,
        projected=chosen.demand,
        reason=chosen.reason,
        notes=tuple(dict.fromkeys((*notes, *filter(None, unknown)))),
        refused=_one_per_reason(outcome.refused),
        candidates=tuple(_considered(decision) for decision in outcome.decisions),
    )


def _model_record(spec: PipelineSpec) -> ModelRecord:
    return ModelRecord(
        source=str(spec.source),
        class_name=spec.class_name,
        fingerprint=fingerprint(spec),
        components=tuple(ComponentRecord(**_fields(component, ComponentRecord)) for component in spec.components),
    )


def _considered(decision: Decision) -> Considered:
    return Considered(
        settings=settings_of(decision),
        verdict=decision.verdict,
        reason=decision.reason,
        projected=projected(decision.demand),
    )


def projected(demand: Demand) -> Projected:
    """Return a demand without phases and loading."""
    return Projected(**_fields(demand, Projected))


def _fields(source: object, kind: Any) -> dict[str, Any]:
    return {item.name: getattr(source, item.name) for item in fields(kind)}


def _one_per_reason(refused: Sequence[Refused]) -> tuple[Refused, ...]:
    """Keep the first refusal with each reason: they repeat for every number of blocks."""
    return tuple({item.reason: item for item in reversed(refused)}.values())[::-1]
