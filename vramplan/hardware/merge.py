"""Merge the devices that one number may stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields, replace

from vramplan.hardware.types import Accelerator


def merge_candidates(devices: Sequence[Accelerator]) -> Accelerator:
    """Merge the candidates for one device: the least memory, and the facts they share.

    A fact in which they differ is left out, so nothing is guessed. A single candidate is returned as it is.
    """
    first = devices[0]
    if len(devices) == 1:
        return first
    differing = {
        field.name: field.default
        for field in fields(Accelerator)
        if field.default is not MISSING
        and any(getattr(device, field.name) != getattr(first, field.name) for device in devices)
    }
    names = sorted({device.name for device in devices})
    free = [device.free_bytes for device in devices if device.free_bytes is not None]
    return replace(
        first,
        **differing
        | {
            "name": names[0] if len(names) == 1 else f"unidentified: {' or '.join(names)}",
            "uuid": None,
            "total_bytes": min(device.total_bytes for device in devices),
            "free_bytes": min(free, default=None),
            "free_reason": None if not free else "the least of the devices it may be",
            "identified": False,
        },
    )
