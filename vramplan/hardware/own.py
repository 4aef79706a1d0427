"""What this very process already holds of a device, if it uses torch: read without starting anything."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from vramplan.hardware.types import ProcessUsage, Reading


def running_torch(room: str) -> Any | None:
    """torch's module for devices of a kind (`cuda`, `xpu`), where this process has started it already."""
    module = getattr(sys.modules.get("torch"), room, None)
    try:
        return module if module is not None and module.is_initialized() else None
    except Exception:  # half-imported, or built without such devices
        return None


def own_use(room: str, index: int, total_bytes: int) -> tuple[ProcessUsage | None, tuple[Reading, ...]]:
    """What this process has on the device, and what its driver calls free from here; nothing where it has nothing.

    Asking the driver of a device not yet in use would make a context there, which takes hundreds of MiB: so only
    where tensors are, or were.
    """
    torch = running_torch(room)
    if torch is None or index >= _count(torch):
        return None, ()
    allocated, reserved, fraction = 0, 0, 1.0
    readings: tuple[Reading, ...] = ()
    with suppress(Exception):
        allocated, reserved = int(torch.memory_allocated(index)), int(torch.memory_reserved(index))
    with suppress(Exception):  # not every release says, nor every kind of device
        fraction = float(torch.get_per_process_memory_fraction(index))
    if not reserved and fraction >= 1:
        return None, ()
    limit = None
    if fraction < 1:
        with suppress(Exception):
            limit = int(torch.get_device_properties(index).total_memory * fraction)
    if reserved:
        with suppress(Exception):
            free = int(torch.mem_get_info(index)[0])
            readings = (Reading(source="torch", free_bytes=max(0, min(free, total_bytes))),)
    cached = max(0, reserved - allocated)
    own = ProcessUsage(
        has_context=reserved > 0,
        allocated_bytes=allocated,
        cached_bytes=cached,
        fraction=fraction,
        limit_bytes=limit,
    )
    return own, readings


def own_metal_use() -> ProcessUsage | None:
    """What this process has of a Mac's memory through Metal; None where it has nothing, or no torch.

    `driver_allocated_memory` counts what torch has cached too (https://docs.pytorch.org/docs/stable/mps.html).
    """
    metal = getattr(sys.modules.get("torch"), "mps", None)
    try:
        held, used = int(metal.driver_allocated_memory()), int(metal.current_allocated_memory())  # type: ignore[union-attr]
    except Exception:  # no torch, or one without Metal
        return None
    return (
        ProcessUsage(has_context=True, allocated_bytes=used, cached_bytes=max(0, held - used), fraction=1.0)
        if held
        else None
    )


def own_identities(room: str) -> list[str] | None:
    """The UUIDs of the devices in this process' own numbering, without prefix; None where it uses none yet."""
    torch = running_torch(room)
    if torch is None:
        return None
    try:
        return [str(torch.get_device_properties(index).uuid) for index in range(_count(torch))]
    except Exception:  # not every release tells
        return None


def _count(torch: Any) -> int:
    try:
        return int(torch.device_count())
    except Exception:
        return 0
