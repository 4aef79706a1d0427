"""The result of a simulation, from its ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from vramplan.simulator.ledger import Cost, Ledger
from vramplan.simulator.types import SimulatedModule, SimulatedPhase, SimulatedUse, Simulation


def simulation_of(ledger: Ledger, stopped: str | None, *, steps: int, seconds: float) -> Simulation:
    """The result of a simulation that ended in so many seconds after so many steps; `stopped` says why, None if it did
    not run out of memory."""
    allocator = ledger.allocator
    capacity = allocator.capacity_bytes
    return Simulation(
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        host_peak_bytes=ledger.peak_host_bytes,
        pinned_peak_bytes=ledger.peak_pinned_bytes,
        phases=tuple(_phases(ledger)),
        capacity_bytes=capacity,
        fits=None if capacity is None else stopped is None,
        stopped=stopped,
        short_bytes=ledger.short_bytes if stopped else 0,
        over_bytes=ledger.over_bytes if stopped else 0,
        stopped_in=ledger.phase if stopped else None,
        limited=allocator.retries > 0,
        uses=tuple(
            SimulatedUse(
                phase=phase,
                component=component,
                need_bytes=need,
                **asdict(ledger.costs.get((phase, component), Cost())),
            )
            for (phase, component), need in ledger.needs.items()
        ),
        steps=steps,
        decoded=(),
        to_device_bytes=ledger.moved_bytes.get(("cpu", "cuda"), 0),
        to_host_bytes=ledger.moved_bytes.get(("cuda", "cpu"), 0),
        operations=ledger.operations,
        wall_seconds=seconds,
        notes=(),
        modules=tuple(
            SimulatedModule(name=name, flops=cost.flops, traffic_bytes=cost.traffic_bytes, launches=cost.launches)
            for name, cost in ledger.module_costs.items()
        ),
    )


def _phases(ledger: Ledger) -> Sequence[SimulatedPhase]:
    return [
        SimulatedPhase(
            name=name,
            peak_allocated_bytes=peak.allocated_bytes,
            weights_bytes=peak.by_kind.get("weights", 0),
            activation_bytes=peak.by_kind.get("activation", 0),
            workspace_bytes=peak.by_kind.get("workspace", 0),
            component=peak.component,
            module=peak.module,
            operation=peak.operation,
        )
        for name, peak in ledger.peaks.items()
    ]
