"""The order of candidates: by time or by memory; among ties, the plan that changes less and is simpler."""

from __future__ import annotations

from typing import Any, Literal

Prefer = Literal["speed", "memory"]
Verdict = Literal["chosen", "fits", "rejected"]
# Significant digits of times: equal up to the third is a tie. Among equally simple plans the fifth counts, so that no
# memory is left unused that would save time.
_DIGITS, _FINER = 3, 5


def rounded(value: float, digits: int) -> float:
    """Round a value to significant digits; 0 keeps all."""
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
    """Return the values to compare in turn, lower being better, each with its digits (`rounded`).

    Values are of one candidate, or of many as arrays: seconds per call; the index of the quality; the number of
    components with changed weights, and of offloaded ones; bytes. RAM comes before VRAM: of two equally fast plans the
    one that offloads less is the simpler.
    """
    time = seconds, _DIGITS
    simpler = (quality, 0), (changed, 0), (offloaded, 0), (seconds, _FINER), (ram_bytes, 0)
    if prefer == "speed":
        return time, *simpler, (vram_bytes, 0)
    return (vram_bytes + ram_bytes * (vram_bytes == 0), 0), time, *simpler
