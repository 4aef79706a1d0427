"""The types of a plan, which is a YAML file that users can read, diff and edit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vramplan.common.shown import Shown
from vramplan.hardware.types import Accelerator, Budget, Host
from vramplan.pipeline.sources import Source, parse_source
from vramplan.pipeline.types import PipelineSpec
from vramplan.planner.candidates import Refused
from vramplan.planner.clock import Bottleneck
from vramplan.planner.demand import Demand
from vramplan.planner.order import Prefer, Verdict
from vramplan.planner.residuals import Basis
from vramplan.strategies import AXES
from vramplan.strategies.base import Quality
from vramplan.strategies.settings import is_stock
from vramplan.units import format_bytes, format_seconds_range
from vramplan.workload import Workload

SCHEMA_VERSION = 2  # 1 had no `stock`, neither in a plan nor in its preferences


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentRecord:
    """A component of the plan: class, weights in bytes, the dtype of most weights, and the variant of their files."""

    name: str
    class_name: str
    library: str
    dtype: str
    weight_bytes: int
    variant: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """The pipeline a plan is for. `source` is `live`, a folder, `profile:NAME`, or `hub:owner/name@commit`."""

    source: str
    class_name: str
    fingerprint: str
    components: tuple[ComponentRecord, ...]

    @property
    def origin(self) -> Source:
        """The source as a type."""
        return parse_source(self.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRecord:
    """The machine of a plan: torch device, accelerator, host, budget, and versions of libraries that affect memory."""

    device: str
    accelerator: Accelerator | None
    host: Host
    budget: Budget
    software: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """The preferences of the user, kept for planning again. `settings` are those that the user fixed, `stock` leaves
    only settings that need no vramplan."""

    allow: Quality | None = None
    prefer: Prefer = "speed"
    vram: str | None = None
    ram: str | None = None
    margin: str | None = None
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stock: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings as text: a placement per component, those of the VAE's decode, and those of the weights, attention
    and compiling of components; without a setting the component is unchanged."""

    placement: Mapping[str, str]
    decode: tuple[str, ...] = ()
    weights: Mapping[str, str] = field(default_factory=dict)
    attention: Mapping[str, str] = field(default_factory=dict)
    compile: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Projected:
    """The price of a candidate in short: bytes, seconds, the longest part of a step, and the weakest basis."""

    vram_allocated_bytes: int
    vram_reserved_bytes: int
    ram_bytes: int
    pinned_bytes: int
    disk_bytes: int
    seconds_per_step: float
    seconds_per_call: float
    bottleneck: Bottleneck
    basis: Basis
    seconds_per_step_range: tuple[float, float] | None = None
    seconds_per_call_range: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """A candidate with its verdict and price."""

    settings: Settings
    verdict: Verdict
    reason: str
    projected: Projected


@dataclass(frozen=True, slots=True, kw_only=True)
class StockPlan:
    """The plan for the same request with stock settings alone, or only the `reason` why there is none.

    Settings that the user fixed are kept if they are stock, and open otherwise.
    """

    reason: str
    settings: Settings | None = None
    quality: Quality | None = None
    projected: Demand | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Shown):
    """The settings for one pipeline, workload and machine, with the projection and the reasons.

    `stock` is None if the settings are stock themselves, and in plans from before it was recorded.
    """

    __pydantic_config__ = {"extra": "forbid"}

    schema_version: int
    vramplan_version: str
    model: ModelRecord
    workload: Workload
    machine: MachineRecord
    settings: Settings
    quality: Quality
    projected: Demand
    reason: str
    asked: Preferences = field(default_factory=Preferences)
    notes: tuple[str, ...] = ()
    refused: tuple[Refused, ...] = ()
    stock: StockPlan | None = None
    candidates: tuple[Considered, ...] = ()


def stock_cost(plan: Plan) -> str:
    """Format the stock plan's time against the plan's own, its VRAM, and its quality if that differs; empty if none."""
    if plan.stock is None or plan.stock.projected is None or plan.stock.quality is None:
        return ""
    price, quality = plan.stock.projected, plan.stock.quality.replace("_", " ")
    slower = price.seconds_per_call / max(plan.projected.seconds_per_call, 1e-9)
    seconds = format_seconds_range(price.seconds_per_call, price.seconds_per_call_range)
    text = f"{slower:.2f}x the time, {seconds} a call"
    text += f", {format_bytes(price.vram_reserved_bytes)} of VRAM"
    return text if plan.stock.quality == plan.quality else f"{text}, {quality}"


def load_options(plan: Plan) -> dict[str, Any]:
    """Return the options to describe the plan's pipeline again: a dtype common to all components, and the variant."""
    dtypes = {record.dtype for record in plan.model.components}
    variants = (record.variant for record in plan.model.components if record.variant)
    return {"dtype": dtypes.pop() if len(dtypes) == 1 else None, "variant": next(variants, None)}


def fingerprint(spec: PipelineSpec) -> str:
    """Return a short hash of the classes, weight sizes and dtypes of a pipeline."""
    facts = [
        spec.class_name,
        *(
            [c.name, c.class_name, c.weight_bytes, c.parameter_count, c.dtype]
            for c in sorted(spec.components, key=lambda component: component.name)
        ),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def all_stock(settings: Settings) -> bool:
    """Whether every one of the settings is stock."""
    values = ((row, getattr(settings, row.name)) for row in AXES.values())
    pairs = ((row, value.values() if row.by_component else value) for row, value in values)
    return all(is_stock(row.name, text) for row, texts in pairs for text in texts)


def settings_text(settings: Settings) -> str:
    """Format the settings on one line: equal placements together, then the other axes."""
    groups: dict[str, list[str]] = {}
    for name, text in settings.placement.items():
        groups.setdefault(text, []).append(name)
    if len(groups) == 1:
        placed = next(iter(groups))
    else:
        placed = "; ".join(f"{', '.join(names)}: {text}" for text, names in groups.items())
    others = [getattr(settings, row.name) for row in AXES.values() if row.by_component and row.nothing]
    more = "".join(f" + {name}: {text}" for axis in others for name, text in axis.items())
    return placed + more + "".join(f" + {text}" for text in settings.decode)
