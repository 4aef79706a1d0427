"""Measure peaks and duration of a call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """Peak memory of a phase on the device, in bytes: in tensors, and reserved by torch's allocator."""

    allocated_bytes: int
    reserved_bytes: int


@dataclass(slots=True, kw_only=True)
class Measured:
    """Peaks and duration of a call. VRAM is None on the CPU; `ram_bytes` is the peak of the process so far.

    `seconds_per_step` is of denoising without its first step; None if not timed. `phases` are `encode`,
    `denoise` and `decode`, as far as they could be separated on a device.
    """

    seconds: float = 0.0
    seconds_per_step: float | None = None
    vram_allocated_bytes: int | None = None
    vram_reserved_bytes: int | None = None
    ram_bytes: int = 0
    phases: dict[str, Peak] = field(default_factory=dict)


@contextmanager
def measure_call(device: str) -> Iterator[Measured]:
    """Measure the block: the yielded value is filled at its end. The device's peak statistics are reset when it starts
    and when a phase ends (`end_phase`)."""
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
            last = _peak(device)
            parts = [*result.phases.values(), last]
            result.vram_allocated_bytes = max(part.allocated_bytes for part in parts)
            result.vram_reserved_bytes = max(part.reserved_bytes for part in parts)
            if result.phases:
                result.phases["decode"] = last
        result.seconds = time.perf_counter() - start
        result.ram_bytes = peak_rss_bytes()


def end_phase(took: Measured, device: str, name: str) -> None:
    """Record the device's peak since the last phase ended, or since measuring started, as this phase's.

    Call it inside the block of `measure_call`. Torch tracks peaks on the host, when memory is requested, so no
    synchronization is needed.
    """
    if device.startswith("cpu"):
        return
    import torch

    peak, before = _peak(device), took.phases.get(name)
    took.phases[name] = peak if before is None else _maximum(before, peak)
    torch.accelerator.reset_peak_memory_stats(device)


def _peak(device: str) -> Peak:
    import torch

    return Peak(
        allocated_bytes=torch.accelerator.max_memory_allocated(device),
        reserved_bytes=torch.accelerator.max_memory_reserved(device),
    )


def _maximum(one: Peak, other: Peak) -> Peak:
    return Peak(
        allocated_bytes=max(one.allocated_bytes, other.allocated_bytes),
        reserved_bytes=max(one.reserved_bytes, other.reserved_bytes),
    )


def current_rss_bytes() -> int:
    """The resident memory of this process now, in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """The peak resident memory of this process, in bytes (`getrusage`; Windows: peak working set)."""
    import sys

    import psutil

    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
