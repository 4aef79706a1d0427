"""How fast this machine is: copies, disk reads and matrix products, timed on a torch device. Units per second.

Each function warms up first, so that clocks and link are up, and gives the middle of several runs with the least and
the most. Works on `cpu` too, where a copy is one within the host's memory.
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

Direction = Literal["host_to_device_pinned", "host_to_device_pageable", "device_to_host"]
# Enough to hide the start of a copy: NVIDIA's bandwidthTest copies 32 MiB. Five runs show a spread.
_COPY_BYTES, _COPY_BYTES_WITHIN, _RUNS = 128 * MIB, 32 * MIB, 5
# The last keeps every unit of a large card busy (about 1.1 Tflop at 8192); a small one would need seconds for it, so
# sides grow while there is time. And one a processor can do in time.
_PRODUCT_SIDES = {"cpu": (1024,)}
_PRODUCT_SIDES_ELSEWHERE = (2048, 4096, 8192)
_DISK_BYTES = 64 * MIB
# A measurement starts no run after this time: all five, a warm-up each, are to take less than 3 s together.
_SECONDS = 0.25


def measure_copy(device: str, direction: Direction, *, size_bytes: int | None = None) -> Measurement:
    """Bytes per second that one copy between host and device carries.

    Raises:
        RuntimeError: the device has no such memory, or too little of it is free (torch's own errors).
    """
    import torch

    is_host = torch.device(device).type == "cpu"
    count = size_bytes or (_COPY_BYTES_WITHIN if is_host else _COPY_BYTES)
    there = torch.empty(count, dtype=torch.uint8, device=device)
    here = torch.ones(count, dtype=torch.uint8, pin_memory=direction != "host_to_device_pageable" and not is_host)
    source, target = (there, here) if direction == "device_to_host" else (here, there)
    rates = _rates(lambda: target.copy_(source), torch, device, count)
    return _measured(direction, "bytes/s", rates)


def measure_memory(device: str, *, size_bytes: int | None = None) -> Measurement:
    """Bytes per second that a kernel without products reads and writes: a copy within the device does both.

    Raises:
        RuntimeError: too little memory is free (torch's own error).
    """
    import torch

    count = size_bytes or _COPY_BYTES
    here = torch.ones(count, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    return _measured("within_device", "bytes/s", _rates(lambda: there.copy_(here), torch, device, 2 * count))


def measure_product(device: str, dtype: str, *, side: int | None = None) -> Measurement:
    """Operations per second of a square matrix product in that torch dtype, a multiply and an add counted as two.

    Raises:
        RuntimeError: the device cannot compute in it, or too little memory is free (torch's own errors).
    """
    import torch

    kind = torch.device(device).type
    sides = (side,) if side else _PRODUCT_SIDES.get(kind, _PRODUCT_SIDES_ELSEWHERE)
    for length in sides:
        left, right = (torch.randn(length, length, device=device).to(getattr(torch, dtype)) for _ in range(2))
        rates = _rates(lambda: left @ right, torch, device, 2 * length**3)  # noqa: B023  called in this very turn
        if 8 * (2 * length**3) / min(rates) > _SECONDS:  # twice the side is eight times the work
            break
    return _measured(f"product_{dtype}", "operations/s", rates)


def measure_disk_read(folder: str | Path, *, size_bytes: int | None = None) -> Measurement:
    """Bytes per second read from a new file in the folder, past the file cache.

    Raises:
        OSError: the folder cannot be written to, or is full, or the system reads from its file cache all the same.
    """
    if not (hasattr(os, "posix_fadvise") or sys.platform == "darwin"):
        raise OSError(errno.ENOTSUP, "this system would read the file from its cache, not from the disk")
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".vramplan-measure-") as file:
        written = _fill(file, size_bytes or _DISK_BYTES)
        rates = _until_late(lambda: written / _read_once(file.name), runs=_RUNS)
    return _measured("disk_read", "bytes/s", rates)


def _past_the_cache(descriptor: int) -> None:
    """What is read and written through the descriptor does not stay in the file cache; what is in it is dropped."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    elif sys.platform != "win32":
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _fill(file: IO[bytes], size_bytes: int) -> int:
    """The bytes written to the disk itself: fewer than asked for where it is slow. Random, as some disks compress."""
    _past_the_cache(file.fileno())
    start, written = time.perf_counter(), 0
    while written < size_bytes and (not written or time.perf_counter() - start < _SECONDS):
        file.write(os.urandom(8 * MIB))
        file.flush()
        os.fsync(file.fileno())
        written += 8 * MIB
    return written


def _read_once(name: str) -> float:
    """Seconds to read the file from the disk itself."""
    with open(name, "rb", buffering=0) as file:
        _past_the_cache(file.fileno())
        buffer = bytearray(8 * MIB)
        start = time.perf_counter()
        while file.readinto(buffer):
            pass
        return time.perf_counter() - start


def _rates(work: Callable[[], object], torch: Any, device: str, amount: int) -> list[float]:
    """The amount over the seconds of each run, after one run that does not count."""

    def once() -> float:
        start = time.perf_counter()
        work()
        _wait(torch, device)
        return amount / (time.perf_counter() - start)

    once()
    return _until_late(once, runs=_RUNS)


def _until_late(once: Callable[[], float], *, runs: int) -> list[float]:
    """The results of the runs, of fewer where they take too long, of one at least."""
    start, found = time.perf_counter(), [once()]
    while len(found) < runs and time.perf_counter() - start < _SECONDS:
        found.append(once())
    return found


def _wait(torch: Any, device: str) -> None:
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).synchronize()


def _measured(what: str, unit: Literal["bytes/s", "operations/s"], rates: list[float]) -> Measurement:
    three = (float(f"{rate:.4g}") for rate in (median(rates), min(rates), max(rates)))
    middle, least, most = three
    return Measurement(what=what, unit=unit, median=middle, least=least, most=most, runs=len(rates))
