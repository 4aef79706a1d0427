"""The one order of candidates: by time, or by memory; of equals the plan that changes less and is simpler."""

from __future__ import annotations

from typing import Any, Literal

Prefer = Literal["speed", "memory"]


def third_digit(value: float) -> float:
    """A time up to its third digit: to be faster by less is not to be faster."""
    return float(f"{value:.3g}")


def order(
    prefer: Prefer,
    *,
    seconds: Any,
    quality: Any,
    changed: Any,
    offloaded: Any,
    hidden: Any,
    ram_bytes: Any,
    vram_bytes: Any,
) -> tuple[Any, ...]:
    """What is compared, one after the other, lower being better: of one candidate, or of many as arrays.

    Seconds of a call; the place of the quality among all; components whose weights are changed, and that are
    offloaded; seconds of moving weights in a step, whether hidden or not; bytes. RAM before VRAM: of two that are
    equally fast the one that offloads less is the simpler. Times count up to their third digit.
    """
    simpler = quality, changed, offloaded, hidden, ram_bytes
    if prefer == "speed":
        return seconds, *simpler, vram_bytes
    return vram_bytes + ram_bytes * (vram_bytes == 0), seconds, *simpler
