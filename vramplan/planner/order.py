"""The one order of candidates: by time, or by memory; of equals the plan that changes less and is simpler."""

from __future__ import annotations

from typing import Any, Literal

Prefer = Literal["speed", "memory"]
Verdict = Literal["chosen", "fits", "rejected"]
# Digits that times count to: what differs by less than the third is equally fast, and then, of plans that are equally
# simple, the fifth counts, so that no memory is left idle that would save anything.
_DIGITS, _FINER = 3, 5


def rounded(value: float, digits: int) -> float:
    """The value up to so many digits, 0 for all of them."""
    return float(f"{value:.{digits}g}") if digits else value


def order(
    prefer: Prefer,
    *,
    seconds: Any,
    quality: Any,
    changed: Any,
    offloaded: Any,
    ram_bytes: Any,
    vram_bytes: Any,
) -> tuple[tuple[Any, int], ...]:
    """What is compared, one after the other, lower being better, each with its digits (`rounded`).

    Of one candidate, or of many as arrays: seconds of a call; the place of the quality among all; components whose
    weights are changed, and that are offloaded; bytes. RAM before VRAM: of two that are equally fast the one that
    offloads less is the simpler.
    """
    time = seconds, _DIGITS
    simpler = (quality, 0), (changed, 0), (offloaded, 0), (seconds, _FINER), (ram_bytes, 0)
    if prefer == "speed":
        return time, *simpler, (vram_bytes, 0)
    return (vram_bytes + ram_bytes * (vram_bytes == 0), 0), time, *simpler
