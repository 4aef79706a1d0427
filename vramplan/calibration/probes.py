"""Measure a device: what its driver takes, how fast its link and its products are.

Written against torch.accelerator, so that it is the same for every vendor. On the CPU the same code runs, which is how
it is tested; what it gives on a card has not been checked on one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

from vramplan.hardware import detect
from vramplan.hardware.types import Accelerator
from vramplan.units import MIB

if TYPE_CHECKING:
    import torch

# Long enough that a copy over the fastest link (64 GB/s) takes a few milliseconds.
COPY_BYTES = 256 * MIB
# The side of a square product: large enough for a card's full rate, and three operands of it are 384 MiB.
SIDE = 8192
# The link trains up and clocks rise in the first ones, which do not count.
_WARM_UP, _COUNTED = 3, 9


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


def link_rates(device: str, size: int = COPY_BYTES) -> dict[str, float]:
    """Bytes per second of copies between host and device, as a probe record names them."""
    import torch

    pageable = torch.ones(size, dtype=torch.uint8)
    pinned = _pinned(pageable, device)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    found = {"pageable_to_device_bytes_per_s": size / seconds(device, lambda: there.copy_(pageable))}
    if pinned is not None:
        found["pinned_to_device_bytes_per_s"] = size / seconds(device, lambda: there.copy_(pinned, non_blocking=True))
        found["device_to_pinned_bytes_per_s"] = size / seconds(device, lambda: pinned.copy_(there, non_blocking=True))
    return found


def memory_rate(device: str, size: int = COPY_BYTES) -> float:
    """Bytes per second that a kernel without products reads and writes: a copy within the device does both."""
    import torch

    here = torch.ones(size, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    return 2 * size / seconds(device, lambda: there.copy_(here))


def product_rate(device: str, side: int = SIDE) -> float:
    """Operations per second of a square product in half precision."""
    import torch

    left = torch.rand(side, side, device=device, dtype=torch.float16)
    right = torch.rand(side, side, device=device, dtype=torch.float16)
    return 2 * side**3 / seconds(device, lambda: torch.mm(left, right))


def seconds(device: str, work: Callable[[], object]) -> float:
    """What the work takes, the median of a few after a warm-up, waiting for the device each time."""
    took = []
    for _ in range(_WARM_UP + _COUNTED):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        took.append(time.perf_counter() - start)
    return median(took[_WARM_UP:])


def _wait(device: str) -> None:
    import torch

    if not device.startswith("cpu"):
        torch.accelerator.synchronize(device)


def _pinned(tensor: torch.Tensor, device: str) -> torch.Tensor | None:
    """A page-locked copy; None where the system allows none of that size, or there is nothing to page-lock for."""
    if device.startswith("cpu"):
        return None
    try:
        return tensor.pin_memory()
    except RuntimeError:
        return None


def _use(device: torch.device) -> None:
    """What every pipeline makes the driver load: a product, a convolution, attention."""
    import torch
    from torch.nn import functional

    given = torch.rand(1, 8, 64, 64, device=device, dtype=torch.float16)
    functional.conv2d(given, torch.rand(8, 8, 3, 3, device=device, dtype=torch.float16), padding=1)
    functional.scaled_dot_product_attention(given, given, given)
    torch.mm(given[0, 0], given[0, 1]).softmax(0)
    _wait(str(device))


def _free_bytes(accelerator: Accelerator) -> int | None:
    found = (item.free_bytes for item in detect().accelerators if item.device == accelerator.device)
    return next(found, None)
