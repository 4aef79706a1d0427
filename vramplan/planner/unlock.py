"""Find the changes that would each make a faster candidate fit."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

from vramplan.hardware.types import Accelerator, Budget
from vramplan.pipeline.latents import smaller_size
from vramplan.pipeline.types import PipelineSpec
from vramplan.planner.demand import Demand
from vramplan.units import format_bytes
from vramplan.workload import Workload

# A picture with less than this share of the pixels is not suggested.
_LEAST_PIXELS = 0.25


def unlocks(
    demand: Demand, budget: Budget, spec: PipelineSpec, workload: Workload, accelerator: Accelerator | None
) -> list[str]:
    """Return the changes that would each make a candidate with this demand fit, as phrases; empty if it fits.

    The smaller picture is derived from the peaks, assuming that activations are proportional to pixels.
    """
    limit = budget.vram_bytes
    found = list(_vram(demand, limit, spec, workload, accelerator)) if limit is not None else []
    short = demand.ram_bytes - budget.ram_bytes
    if short > 0:
        more = f"{format_bytes(short)} more RAM"
        return [f"{found[0]} and {more}"] if found else [more]
    return found


def _vram(
    demand: Demand, limit: int, spec: PipelineSpec, workload: Workload, accelerator: Accelerator | None
) -> Iterator[str]:
    short = demand.vram_reserved_bytes - limit
    if short <= 0:
        return
    size = _smaller(demand, limit, spec, workload)
    if size is not None:
        yield size
    if accelerator is not None and accelerator.free_bytes is not None and not accelerator.unified:
        held = accelerator.total_bytes - accelerator.free_bytes
        if held >= short:
            yield f"closing the programs that hold {format_bytes(held)} of the card"
    yield f"{format_bytes(short)} more VRAM"


def _smaller(demand: Demand, limit: int, spec: PipelineSpec, workload: Workload) -> str | None:
    """Return the largest picture of the same shape whose activations fit in the phases with a deficit."""
    share = 1.0
    for phase in demand.phases:
        activations = phase.reserved_bytes - phase.weights_bytes - phase.workspace_bytes
        if phase.reserved_bytes > limit:
            room = limit - phase.weights_bytes - phase.workspace_bytes
            share = min(share, room / activations if activations else 0)
    if not _LEAST_PIXELS < share < 1:
        return None
    size = smaller_size(spec, workload, sqrt(share))
    if size is None:  # sound, or the smallest picture
        return None
    frames = f" x {workload.num_frames} frames" if workload.num_frames > 1 else ""
    return f"{size[1]} x {size[0]}{frames}"
