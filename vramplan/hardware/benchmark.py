"""Time copies, disk reads and matrix products on a torch device, in units per second.

Each function warms up first, to raise the clocks and the link, and returns the median of several runs with the least
and the most. Works on `cpu` too, where a copy is within the host's memory.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import IO, Any, Literal

from vramplan.hardware.types import Measurement
from vramplan.units import MIB

Direction = Literal["host_to_device_pinned", "host_to_device_pageable", "device_to_host", "device_to_host_pageable"]
# Large enough to hide a copy's start-up: NVIDIA's bandwidthTest copies 32 MiB. Five runs show a spread.
_COPY_BYTES, _COPY_BYTES_WITHIN, _RUNS = 128 * MIB, 32 * MIB, 5
# The largest keeps every unit of a large card busy (about 1.1 Tflop at 8192); a small card would need seconds for it,
# so the sides grow while time is left. The CPU has time for one small product.
_PRODUCT_SIDES = {"cpu": (1024,)}
_PRODUCT_SIDES_ELSEWHERE = (2048, 4096, 8192)
_DISK_BYTES = 64 * MIB
# A measurement starts no run after this many seconds: all five, with a warm-up each, take less than 3 s together.
_MOST_SECONDS = 0.25


def measure_copy(device: str, direction: Direction, *, size_bytes: int | None = None) -> Measurement:
    """Measure the bytes per second of one copy between host and device; to pageable memory, it is allocated anew.

    Raises:
        RuntimeError: the device has no such memory, or too little of it is free (torch's own errors).
    """
    import torch

    is_host = torch.device(device).type == "cpu"
    count = size_bytes or (_COPY_BYTES_WITHIN if is_host else _COPY_BYTES)
    remote = torch.empty(count, dtype=torch.uint8, device=device)
    local = torch.ones(count, dtype=torch.uint8, pin_memory=not direction.endswith("pageable") and not is_host)
    source, target = (remote, local) if direction == "device_to_host" else (local, remote)
    fresh = direction == "device_to_host_pageable"
    rates = _rates(lambda: remote.to("cpu", copy=True) if fresh else target.copy_(source), torch, device, count)
    return _summary(direction, "bytes/s", rates)


def measure_memory(device: str, *, size_bytes: int | None = None) -> Measurement:
    """Measure the bytes per second of the device's memory: a copy within it, reads and writes counted.

    Raises:
        RuntimeError: too little memory is free (torch's own error).
    """
    import torch

    count = size_bytes or _COPY_BYTES
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _summary("within_device", "bytes/s", _rates(lambda: target.copy_(source), torch, device, 2 * count))


def measure_product(device: str, dtype: str, *, side: int | None = None) -> Measurement:
    """Measure the operations per second of a square matrix product in a torch dtype; a multiply-add counts as two.

    Raises:
        RuntimeError: the device cannot compute in it, or too little memory is free (torch's own errors).
    """
    import torch

    kind = torch.device(device).type
    sides = (side,) if side else _PRODUCT_SIDES.get(kind, _PRODUCT_SIDES_ELSEWHERE)
    for length in sides:
        left, right = (torch.randn(length, length, device=device).to(getattr(torch, dtype)) for _ in range(2))
        rates = _rates(lambda: left @ right, torch, device, 2 * length**3)  # noqa: B023  called in this iteration
        if 8 * (2 * length**3) / min(rates) > _MOST_SECONDS:  # twice the side is eight times the work
            break
    return _summary(f"product_{dtype}", "operations/s", rates)


def measure_disk_read(folder: str | Path, *, size_bytes: int | None = None) -> Measurement:
    """Measure the bytes per second read from a new file in the folder, bypassing the file cache.

    Raises:
        OSError: the folder is not writable or full, or the system cannot bypass its file cache.
    """
    if not (hasattr(os, "posix_fadvise") or sys.platform == "darwin"):
        raise OSError(errno.ENOTSUP, "this system would read the file from its cache, not from the disk")
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".vramplan-measure-") as file:
        written = _fill(file, size_bytes or _DISK_BYTES)
        rates = _repeat(lambda: written / _read_once(file.name), runs=_RUNS)
    return _summary("disk_read", "bytes/s", rates)


def _bypass_cache(descriptor: int) -> None:
    """Keep the descriptor's reads and writes out of the file cache, and drop its cached pages."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    elif sys.platform != "win32":
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _fill(file: IO[bytes], size_bytes: int) -> int:
    """Write random bytes, as some disks compress, and return their count: fewer than `size_bytes` on a slow disk."""
    _bypass_cache(file.fileno())
    start, written = time.perf_counter(), 0
    while written < size_bytes and (not written or time.perf_counter() - start < _MOST_SECONDS):
        file.write(os.urandom(8 * MIB))
        file.flush()
        os.fsync(file.fileno())
        written += 8 * MIB
    return written


def _read_once(name: str) -> float:
    """Seconds to read the file from the disk itself."""
    with open(name, "rb", buffering=0) as file:
        _bypass_cache(file.fileno())
        buffer = bytearray(8 * MIB)
        start = time.perf_counter()
        while file.readinto(buffer):
            pass
        return time.perf_counter() - start


def _rates(work: Callable[[], object], torch: Any, device: str, amount: int) -> list[float]:
    """The rate of each run: `amount` over its seconds, after one warm-up run."""

    def once() -> float:
        start = time.perf_counter()
        work()
        _wait(torch, device)
        return amount / (time.perf_counter() - start)

    once()
    return _repeat(once, runs=_RUNS)


def _repeat(once: Callable[[], float], *, runs: int) -> list[float]:
    """The results of `runs` calls, fewer if they take longer than `_MOST_SECONDS`, at least one."""
    start, results = time.perf_counter(), [once()]
    while len(results) < runs and time.perf_counter() - start < _MOST_SECONDS:
        results.append(once())
    return results


def _wait(torch: Any, device: str) -> None:
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).synchronize()


def _summary(what: str, unit: Literal["bytes/s", "operations/s"], rates: list[float]) -> Measurement:
    three = (float(f"{rate:.4g}") for rate in (median(rates), min(rates), max(rates)))
    middle, least, most = three
    return Measurement(what=what, unit=unit, median=middle, least=least, most=most, runs=len(rates))
