"""Bars of the memory that a plan, a simulation or a call takes, and of a machine's budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramplan.view.plot.colours import ACTIVATIONS, FITS, HOST, LIMIT, NEUTRAL, WEIGHTS, WORKSPACE
from vramplan.view.terminal import Bar, Segment

if TYPE_CHECKING:
    from vramplan.calibration.peaks import Measured
    from vramplan.hardware.types import Budget
    from vramplan.planfile.types import Plan
    from vramplan.planner.demand import PhaseDemand
    from vramplan.simulator.types import SimulatedPhase, Simulation


def plan_bar(plan: Plan) -> Bar | None:
    """The device's whole memory at the plan's peak; None without a device.

    The rest, which is neither the plan's, nor margin, nor driver context, belongs to other programs or is off limits.
    """
    demand = plan.projected
    if not demand.phases:
        return None
    peak = max(demand.phases, key=lambda phase: phase.allocated_bytes)
    computing = _usage_segments(peak, demand.vram_reserved_bytes - peak.allocated_bytes)
    return _whole_device("VRAM", plan, computing, demand.vram_reserved_bytes)


def comparison_bars(plan: Plan, measured: Measured) -> list[Bar]:
    """The plan's bar above the bar of its measured call, on one scale; empty without a device or measured VRAM.

    The measured bar has one part for all tensors: only a simulation knows their purpose.
    """
    projected, allocated, reserved = plan_bar(plan), measured.vram_allocated_bytes, measured.vram_reserved_bytes
    if projected is None or allocated is None or reserved is None:
        return []
    took = [Segment("in tensors", allocated, "█#", WEIGHTS[2]), _cache_segment(reserved - allocated)]
    real = _whole_device("measured ", plan, took, reserved)
    return [Bar("projected", projected.parts), real] if real else []


def _whole_device(name: str, plan: Plan, computing: list[Segment], reserved_bytes: int) -> Bar | None:
    device, budget = plan.machine.accelerator, plan.machine.budget
    if device is None or budget.vram_bytes is None:
        return None
    taken = {item.name: item.size_bytes for item in budget.deductions if item.memory == "vram"}
    context, margin = taken.get("driver context", 0), taken.get("margin", 0)
    beyond = max(0, reserved_bytes - budget.vram_bytes)  # of a call that exceeded the budget
    return Bar(
        name,
        [
            *computing,
            _headroom(budget.vram_bytes - reserved_bytes),
            Segment("margin", margin - beyond, "◇m", HOST),
            Segment("context", context, "▚c", LIMIT),
            Segment("not to be used", device.total_bytes - budget.vram_bytes - margin - context, "▞x", NEUTRAL),
        ],
    )


def simulation_bar(simulation: Simulation) -> Bar:
    """The memory at the simulation's peak, with the headroom below its capacity, if any."""
    peak = max(simulation.phases, key=lambda phase: phase.peak_allocated_bytes, default=None)
    if peak is None:
        return Bar("VRAM", [])
    cached = simulation.peak_reserved_bytes - peak.peak_allocated_bytes
    left = (simulation.capacity_bytes or 0) - simulation.peak_reserved_bytes
    return Bar("VRAM", [*_usage_segments(peak, cached), _headroom(left)])


def budget_bar(budget: Budget) -> Bar:
    """The budget of the device's memory, and each deduction from it."""
    styles = (LIMIT, HOST, NEUTRAL, WORKSPACE, ACTIVATIONS)
    taken = [item for item in budget.deductions if item.memory == "vram" and item.size_bytes > 0]
    parts = [
        Segment(item.name, item.size_bytes, f"▒{item.name[0]}", styles[number % len(styles)])
        for number, item in enumerate(taken)
    ]
    return Bar("VRAM", [Segment("may be used", budget.vram_bytes or 0, "█#", WEIGHTS[0]), *parts])


def _usage_segments(peak: PhaseDemand | SimulatedPhase, cached: int) -> list[Segment]:
    return [
        Segment("weights", peak.weights_bytes, "█#", WEIGHTS[0]),
        Segment("activations", peak.activation_bytes, "▓+", ACTIVATIONS),
        Segment("workspace", peak.workspace_bytes, "▒~", WORKSPACE),
        _cache_segment(cached),
    ]


def _cache_segment(size: int) -> Segment:
    return Segment("kept by torch", size, "░:", FITS)


def _headroom(size: int) -> Segment:
    return Segment("headroom", size, "·.", "green")
