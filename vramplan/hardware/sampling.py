"""Repeated readings of a value, and their median and spread."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from vramplan.units import MIB

Value = TypeVar("Value")

# An allocation of another program that lasts a few milliseconds is in at most one reading of three.
READINGS, SECONDS = 3, 0.01
# Smaller changes are the driver's own. A choice.
_STILL_BYTES = 64 * MIB


def samples(read: Callable[[], Value]) -> list[Value]:
    """`READINGS` results of `read`, `SECONDS` apart."""
    values = [read()]
    for _ in range(READINGS - 1):
        time.sleep(SECONDS)
        values.append(read())
    return values


def low_median(readings: list[int | None]) -> int | None:
    """The lower median of the known readings; None if there are none."""
    known = [reading for reading in readings if reading is not None]
    return sorted(known)[(len(known) - 1) // 2] if known else None


def spread(readings: list[int | None]) -> tuple[int, int] | None:
    """The least and the most reading if they differ by more than `_STILL_BYTES`, else None."""
    known = [reading for reading in readings if reading is not None]
    differs = bool(known) and max(known) - min(known) > _STILL_BYTES
    return (min(known), max(known)) if differs else None
