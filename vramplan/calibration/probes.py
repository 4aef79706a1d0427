"""Measure a device: what its driver takes, how fast its link and its products are.

Written against torch.accelerator, so that it is the same for every vendor. On the CPU the same code runs, which is how
it is tested; what it gives on a card has not been checked on one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramplan.hardware import detect
from vramplan.hardware.measure import Direction, measure_copy, measure_memory, measure_product
from vramplan.hardware.types import Accelerator

if TYPE_CHECKING:
    import torch


def context_bytes(accelerator: Accelerator) -> int | None:
    """What the driver takes for itself once torch has used the device, beside what torch's allocator holds.

    To be called before anything else uses the device. None where the driver does not say what is free, or where torch
    used it before. Another program that takes or gives back memory meanwhile is counted too.
    """
    import torch

    before = _free_bytes(accelerator)
    if before is None or torch.accelerator.memory.memory_reserved(accelerator.device):
        return None
    _use(torch.device(accelerator.device))
    after = _free_bytes(accelerator)
    held = torch.accelerator.memory.memory_reserved(accelerator.device)
    return None if after is None or before - after <= held else before - after - held


def link_rates(device: str, size: int | None = None) -> dict[str, float]:
    """Bytes per second of copies between host and device, as a probe record names them; on the CPU nothing is
    page-locked, and elsewhere only where the system allows it."""
    found = {"pageable_to_device_bytes_per_s": _copy(device, "host_to_device_pageable", size)}
    if device.startswith("cpu"):
        return found
    try:
        found["pinned_to_device_bytes_per_s"] = _copy(device, "host_to_device_pinned", size)
        found["device_to_pinned_bytes_per_s"] = _copy(device, "device_to_host", size)
    except RuntimeError:
        pass
    return found


def _copy(device: str, direction: Direction, size: int | None) -> float:
    return measure_copy(device, direction, size_bytes=size).median


def memory_rate(device: str, size: int | None = None) -> float:
    """Bytes per second that a kernel without products reads and writes."""
    return measure_memory(device, size_bytes=size).median


def product_rate(device: str, side: int | None = None) -> float:
    """Operations per second of a square product in half precision."""
    return measure_product(device, "float16", side=side).median


def _use(device: torch.device) -> None:
    """What every pipeline makes the driver load: a product, a convolution, attention."""
    import torch
    from torch.nn import functional

    given = torch.rand(1, 8, 64, 64, device=device, dtype=torch.float16)
    functional.conv2d(given, torch.rand(8, 8, 3, 3, device=device, dtype=torch.float16), padding=1)
    functional.scaled_dot_product_attention(given, given, given)
    torch.mm(given[0, 0], given[0, 1]).softmax(0)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _free_bytes(accelerator: Accelerator) -> int | None:
    """What the drivers call free: without what torch has cached, which `free_bytes` counts as free."""
    found = next((item for item in detect().accelerators if item.device == accelerator.device), None)
    if found is None:
        return None
    return min((reading.free_bytes for reading in found.free_readings), default=found.free_bytes)
