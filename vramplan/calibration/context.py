"""Measure the size of a device's driver context.

Written against torch.accelerator, so the same for every vendor. It is tested on the CPU, with the same code; its
results on a card have not been checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramplan.hardware.detect import detect
from vramplan.hardware.types import Accelerator

if TYPE_CHECKING:
    import torch


def context_bytes(accelerator: Accelerator) -> int | None:
    """Bytes of the driver context: the memory in use after torch used the device, without torch's allocator.

    Call it before anything else uses the device. None if the driver does not report free memory, or if torch used the
    device before. Memory that another program takes or releases meanwhile is counted too.
    """
    import torch

    before = _free_bytes(accelerator)
    if before is None or torch.accelerator.memory.memory_reserved(accelerator.device):
        return None
    _use(torch.device(accelerator.device))
    after = _free_bytes(accelerator)
    held = torch.accelerator.memory.memory_reserved(accelerator.device)
    return None if after is None or before - after <= held else before - after - held


def _use(device: torch.device) -> None:
    """Run the kernels that every pipeline makes the driver load: a product, a convolution, attention."""
    import torch
    from torch.nn import functional

    values = torch.rand(1, 8, 64, 64, device=device, dtype=torch.float16)
    functional.conv2d(values, torch.rand(8, 8, 3, 3, device=device, dtype=torch.float16), padding=1)
    functional.scaled_dot_product_attention(values, values, values)
    torch.mm(values[0, 0], values[0, 1]).softmax(0)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _free_bytes(accelerator: Accelerator) -> int | None:
    """The free bytes by the drivers, without torch's cache, which the accelerator's `free_bytes` includes."""
    current = next((item for item in detect().accelerators if item.device == accelerator.device), None)
    if current is None:
        return None
    return min((reading.free_bytes for reading in current.free_readings), default=current.free_bytes)
