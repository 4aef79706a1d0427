"""A plan as text: the summary, and every candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vramplan.planfile.types import settings_text, stock_cost
from vramplan.units import format_bytes, format_seconds_range
from vramplan.view.shared import _NUMERIC, blocks_row, notes_view
from vramplan.workload import workload_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vramplan.planfile.types import Plan, Projected
    from vramplan.planner.demand import Demand

_VERDICT_STYLES = {"chosen": "bold green", "fits": "green", "rejected": "red"}


def text_of(plan: Plan) -> str:
    """The plan for a person, as plain text."""
    from vramplan.view.terminal import as_text

    return as_text(plan_view(plan))


def html_of(plan: Plan) -> str:
    """The plan for a notebook, with the picture of its candidates."""
    from vramplan.view.plot.save import picture_html
    from vramplan.view.terminal import as_html

    return as_html(plan_view(plan)) + picture_html(plan)


def plan_view(plan: Plan) -> RenderableType:
    """The plan for a person: settings, memory against the limits, speed, quality, reason, and the phases."""
    from vramplan.view.bars import plan_bar
    from vramplan.view.terminal import hang, stack, table

    bar = plan_bar(plan)
    return stack(
        [
            *(hang(f"{name:<9} {text}", 10) for name, text in plan_rows(plan)),
            *(("", bar) if bar else ()),
            "",
            table(("phase", "runs", "on the device", "weights", "activations"), _phase_rows(plan), _NUMERIC),
            *notes_view(plan.notes),
        ]
    )


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """The summary of a plan, as pairs of name and text."""
    from vramplan.planner.demand import fits_sentence

    card = plan.machine.accelerator.name if plan.machine.accelerator else "the CPU"
    return [
        ("pipeline", f"{plan.model.class_name} ({plan.model.source})"),
        ("on", f"{card} ({plan.machine.device})"),
        ("for", workload_text(plan.workload)),
        ("chosen", settings_text(plan.settings)),
        *blocks_row(plan.projected.phases),
        ("fits", fits_sentence(plan.projected, plan.machine.budget)),
        *_loading_row(plan),
        ("speed", _speed(plan)),
        *_rates_row(plan),
        ("quality", plan.quality.replace("_", " ")),
        ("why", plan.reason),
        *_stock_row(plan),
    ]


def _stock_row(plan: Plan) -> list[tuple[str, str]]:
    """The fastest stock plan for the same request against the plan; empty if the plan is stock or records none."""
    found = plan.stock
    if found is None:
        return []
    if found.settings is None:
        return [("stock", f"none: {found.reason}")]
    return [("stock", f"{settings_text(found.settings)}: {stock_cost(plan)}")]


def _loading_row(plan: Plan) -> list[tuple[str, str]]:
    """The peak of RAM while loading; empty if loading takes none."""
    load = plan.projected.load
    if load is None or not load.ram_bytes:
        return []
    return [("loading", f"at most {format_bytes(load.ram_bytes)} of RAM, while {load.component} is loaded")]


def _speed(plan: Plan) -> str:
    demand = plan.projected
    step, call = times_text(demand)
    about = "about " if demand.seconds_per_call_range is None else ""
    return f"{about}{step} a step, {call} a call, limited by {demand.bottleneck} ({demand.basis})"


def times_text(price: Demand | Projected) -> tuple[str, str]:
    """The seconds of a step and of a call, as ranges where it is known how far off they may be."""
    return (
        format_seconds_range(price.seconds_per_step, price.seconds_per_step_range),
        format_seconds_range(price.seconds_per_call, price.seconds_per_call_range),
    )


def _rates_row(plan: Plan) -> list[tuple[str, str]]:
    """Where the rates behind the times are from, and which were measured; empty if none was."""
    card = plan.machine.accelerator
    return [("rates", card.rates.source)] if card and card.rates and card.rates.measured else []


def _phase_rows(plan: Plan) -> list[Sequence[str]]:
    return [
        (
            phase.name,
            phase.component,
            ", ".join(phase.on_device),
            format_bytes(phase.weights_bytes),
            format_bytes(phase.activation_bytes),
        )
        for phase in plan.projected.phases
    ]


def explain_view(plan: Plan) -> RenderableType:
    """Every candidate in three lines: verdict, memory, times and bottleneck; the settings; the reason."""
    from rich.text import Text

    from vramplan.view.terminal import hang, stack

    lines: list[RenderableType] = [
        f"{len(plan.candidates)} candidates for {plan.model.class_name}; the first is the plan",
        *(hang(f"{name}: {text}", 2) for name, text in (*blocks_row(plan.projected.phases), *_stock_row(plan))),
        "",
        Text(f"{'':8} {'VRAM':>10} {'RAM':>10} {'step':>15} {'call':>15}  limited by", "bold"),
    ]
    for item in plan.candidates:
        price = item.projected
        sizes = f"{format_bytes(price.vram_reserved_bytes):>10} {format_bytes(price.ram_bytes):>10}"
        times = " ".join(f"{text:>15}" for text in times_text(price))
        lines.append(hang(f"{item.verdict:8} {sizes} {times}  {price.bottleneck}", 9, _VERDICT_STYLES[item.verdict]))
        lines += [hang(f"{'':8} {text}", 9) for text in (settings_text(item.settings), item.reason)]
    if plan.refused:
        lines += ["", "not possible here"]
        lines += [hang(f"  {item.setting} on {item.component}: {item.reason}", 2) for item in plan.refused]
    return stack(lines)
