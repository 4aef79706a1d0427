"""`plan`, `simulate` and `check` say the same of one plan, to the byte."""

from __future__ import annotations

from typing import Any

import pytest

import vramplan
from vramplan.planner.demand import fits_sentence
from vramplan.units import format_bytes

PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "chosen": ("stable-diffusion-1.5", {}),
    "in RAM": ("pixart-alpha", {"placement": "model_cpu_offload"}),
    "page-locked": ("pixart-alpha", {"placement.transformer": "group_offload:stream=true"}),
    "on disk": ("pixart-alpha", {"placement.text_encoder": "group_offload:disk=true"}),
    "quantized": ("pixart-alpha", {"weights.text_encoder": "torchao:type=int8"}),
    "sound": ("stable-audio-open", {"placement": "model_cpu_offload"}),
}


@pytest.mark.parametrize("kind", PLANS)
def test_simulate_and_plan_agree(kind: str) -> None:
    name, settings = PLANS[kind]
    plan = vramplan.plan(name, device="rtx-4090", ram="64GiB", settings=settings)
    projected, budget = plan.projected, plan.machine.budget
    found = vramplan.simulate(name, plan, capacity_bytes=budget.vram_bytes)
    assert found.fits
    assert found.peak_reserved_bytes == projected.vram_reserved_bytes
    assert found.peak_allocated_bytes == projected.vram_allocated_bytes
    host = found.ram_bytes, found.pinned_bytes, found.disk_bytes
    assert host == (projected.ram_bytes, projected.pinned_bytes, projected.disk_bytes)
    assert bool(found.disk_bytes) is (kind == "on disk")
    if kind in ("in RAM", "page-locked"):
        assert found.ram_bytes
    assert f"RAM       {format_bytes(projected.ram_bytes)}, of which" in str(found)
    said = fits_sentence(projected, budget)  # what `check` says
    assert f"{format_bytes(found.peak_reserved_bytes)} of" in said
    assert f"{format_bytes(found.ram_bytes or 0)} of" in said
