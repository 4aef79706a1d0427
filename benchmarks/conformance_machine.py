"""The card that both conformance benchmarks simulate on."""

from __future__ import annotations

from vramplan.hardware.types import Accelerator


def accelerator() -> Accelerator:
    """A card of 1 TiB, so that no test pipeline is too large for it."""
    return Accelerator(kind="cuda", index=0, name="simulated", total_bytes=1 << 40, free_bytes=1 << 40)
