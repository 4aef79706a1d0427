"""A decision's settings as a plan keeps them."""

from __future__ import annotations

from collections.abc import Sequence
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
from vramplan.planner.decide import Decision, Outcome
from vramplan.planner.demand import Demand
from vramplan.strategies import AXES, AxisRow, Execution
from vramplan.strategies.settings import format_setting
from vramplan.workload import Workload


def settings_of(decision: Decision) -> Settings:
    """The settings as text, by axis and component."""
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
    """The outcome as a plan."""
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
        refused=_once(outcome.refused),
        candidates=tuple(_considered(decision) for decision in outcome.decisions),
    )


def _model_record(spec: PipelineSpec) -> ModelRecord:
    return ModelRecord(
        source=str(spec.source),
        class_name=spec.class_name,
        fingerprint=fingerprint(spec),
        components=tuple(
            ComponentRecord(
                name=component.name,
                class_name=component.class_name,
                library=component.library,
                dtype=component.dtype,
                weight_bytes=component.weight_bytes,
                variant=component.variant,
            )
            for component in spec.components
        ),
    )


def _considered(decision: Decision) -> Considered:
    return Considered(
        settings=settings_of(decision),
        verdict=decision.verdict,
        reason=decision.reason,
        projected=projected(decision.demand),
    )


def projected(demand: Demand) -> Projected:
    """A demand without its phases."""
    return Projected(
        vram_allocated_bytes=demand.vram_allocated_bytes,
        vram_reserved_bytes=demand.vram_reserved_bytes,
        ram_bytes=demand.ram_bytes,
        pinned_bytes=demand.pinned_bytes,
        disk_bytes=demand.disk_bytes,
        seconds_per_step=demand.seconds_per_step,
        seconds_per_call=demand.seconds_per_call,
        bottleneck=demand.bottleneck,
        basis=demand.basis,
    )


def _once(refused: Sequence[Refused]) -> tuple[Refused, ...]:
    """Each reason once: the same refusal for every number of blocks tells nobody anything."""
    return tuple({item.reason: item for item in reversed(refused)}.values())[::-1]
