"""Several readings with time between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from vramplan.units import MIB

Value = TypeVar("Value")

# A neighbour's allocation that comes and goes within milliseconds is in one reading of three at most.
READINGS, SECONDS = 3, 0.01
# Movements below this are the driver's own. A choice.
_STILL_BYTES = 64 * MIB


def spaced(read: Callable[[], Value]) -> list[Value]:
    """What it says, several times."""
    found = [read()]
    for _ in range(READINGS - 1):
        time.sleep(SECONDS)
        found.append(read())
    return found


def middle(readings: list[int | None]) -> int | None:
    """The middle one of those that gave a number; None where none did."""
    known = [reading for reading in readings if reading is not None]
    return sorted(known)[(len(known) - 1) // 2] if known else None


def moved(readings: list[int | None]) -> tuple[int, int] | None:
    """The least and the most, where they are so far apart that it should be said."""
    known = [reading for reading in readings if reading is not None]
    apart = bool(known) and max(known) - min(known) > _STILL_BYTES
    return (min(known), max(known)) if apart else None
