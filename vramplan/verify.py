"""Measured against projected: what a call really took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Measured:
    """Peaks and duration of a call. VRAM is None on the CPU; `ram_bytes` is the process's highest so far.

    `seconds_per_step` is of denoising, its first step left out; None where that was not timed.
    """

    seconds: float = 0.0
    seconds_per_step: float | None = None
    vram_allocated_bytes: int | None = None
    vram_reserved_bytes: int | None = None
    ram_bytes: int = 0


@contextmanager
def measured(device: str) -> Iterator[Measured]:
    """Fills the yielded value when the block ends. Resets the device's peak statistics when it starts."""
    import torch

    result = Measured()
    on_accelerator = not device.startswith("cpu")
    if on_accelerator:
        torch.accelerator.synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
    start = time.perf_counter()
    try:
        yield result
    finally:
        if on_accelerator:
            torch.accelerator.synchronize(device)
            result.vram_allocated_bytes = torch.accelerator.max_memory_allocated(device)
            result.vram_reserved_bytes = torch.accelerator.max_memory_reserved(device)
        result.seconds = time.perf_counter() - start
        result.ram_bytes = peak_rss_bytes()


def current_rss_bytes() -> int:
    """The resident memory this process has now, in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """The most resident memory this process has had, in bytes (`getrusage`; Windows: peak working set)."""
    import sys

    import psutil

    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
