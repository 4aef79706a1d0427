"""The use of a device by this process through torch, read without importing torch or starting a device."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from vramplan.hardware.types import ProcessUsage, Reading


def initialized_torch(device_type: str) -> Any | None:
    """torch's module for a device type (`cuda`, `xpu`) if this process has initialized it, else None."""
    module = getattr(sys.modules.get("torch"), device_type, None)
    try:
        return module if module is not None and module.is_initialized() else None
    except Exception:  # half-imported, or built without such devices
        return None


def process_usage(device_type: str, index: int, total_bytes: int) -> tuple[ProcessUsage | None, tuple[Reading, ...]]:
    """The process' use of the device, and the free memory by its driver; None and nothing if it is not in use.

    Asking the driver about a device not yet in use would make a context of hundreds of MiB, so it is only asked if the
    device has, or had, tensors.
    """
    torch = initialized_torch(device_type)
    if torch is None or index >= _count(torch):
        return None, ()
    allocated, reserved, fraction = 0, 0, 1.0
    readings: tuple[Reading, ...] = ()
    with suppress(Exception):
        allocated, reserved = int(torch.memory_allocated(index)), int(torch.memory_reserved(index))
    with suppress(Exception):  # missing in some releases, and for some types of device
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


def metal_usage() -> ProcessUsage | None:
    """The process' use of a Mac's memory through Metal; None if it uses none, or has no torch.

    `driver_allocated_memory` includes torch's cache (https://docs.pytorch.org/docs/stable/mps.html).
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


def process_uuids(device_type: str) -> list[str] | None:
    """The UUIDs of the devices in this process' own numbering, without prefix; None if it has not started any."""
    torch = initialized_torch(device_type)
    if torch is None:
        return None
    try:
        return [str(torch.get_device_properties(index).uuid) for index in range(_count(torch))]
    except Exception:  # missing in some releases
        return None


def _count(torch: Any) -> int:
    try:
        return int(torch.device_count())
    except Exception:
        return 0
