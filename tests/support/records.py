"""Records as calls on a card leave them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vramplan.calibration.records import CallRecord, ProbeRecord, Usage
from vramplan.common.versions import versions
from vramplan.hardware.types import Accelerator
from vramplan.units import GIB

CARD = Accelerator(
    kind="cuda", index=0, name="Some Card", total_bytes=24 * GIB, free_bytes=24 * GIB, driver="570.1", uuid="GPU-1"
)


def took(reserved: int | None = 10 * GIB) -> Usage:
    return Usage(
        vram_allocated_bytes=reserved,
        vram_reserved_bytes=reserved,
        ram_bytes=GIB,
        seconds_per_step=0.5,
        seconds_per_call=20.0,
    )


def call(number: int = 0, share: float = 0.0, **changes: Any) -> CallRecord:
    """A call of a plan of its own, which took so much more than was projected."""
    told: dict[str, Any] = {
        "time": "2026-11-21T06:00:00+00:00",
        "device": CARD.name,
        "card": None,
        "driver": CARD.driver,
        "versions": dict(versions()),
        "pipeline": "SomePipeline",
        "settings": f"transformer: weight_streaming:streamed={number}",
        "shape": "1024 x 1024",
        "basis": "simulated",
        "projected": took(),
        "measured": took(int(10 * GIB * (1 + share))),
    }
    return CallRecord(**(told | changes))


def probe(**changes: Any) -> ProbeRecord:
    told = {"time": "2026-11-21T06:00:00+00:00", "device": CARD.name, "card": None, "driver": CARD.driver}
    return replace(ProbeRecord(**told, versions=dict(versions())), **changes)
