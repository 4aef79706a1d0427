"""Time copies, disk reads, matrix products, attention and kernel launches on a torch device.

Each function warms up first, to raise the clocks and the link, and returns the median of several runs with the least
and the most. Works on `cpu` too, where a copy is within the host's memory.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import IO, Any, Literal

from vramplan.hardware.types import Measurement
from vramplan.units import MIB

Direction = Literal["host_to_device_pinned", "host_to_device_pageable", "device_to_host", "device_to_host_pageable"]
# Large enough to hide a copy's start-up: NVIDIA's bandwidthTest copies 32 MiB. Five runs show a spread.
_COPY_BYTES, _COPY_BYTES_WITHIN, _RUNS = 128 * MIB, 32 * MIB, 5
# The largest keeps every unit of a large card busy (about 1.1 Tflop at 8192); a small card would need seconds for it,
# so the sides grow while time is left. Pipelines' linear layers have the work of sides 2000 (Stable Diffusion 1.5) to
# 5600 (FLUX.1 at 1024 x 1024).
_PRODUCT_SIDES, _PRODUCT_SIDES_CPU = (2048, 4096, 8192), (256, 512, 1024)
# Head sizes of the two kinds of attention that the rates tell apart, without a mask: 24 heads of 4096 tokens are those
# of FLUX.1 and Stable Diffusion 3.5 at 1024 x 1024.
HEAD_SIZES = (64, 128)
_HEADS, _TOKENS, _HEADS_CPU, _TOKENS_CPU = 24, 4096, 4, 256
_DISK_BYTES = 64 * MIB
# A measurement starts no run after this many seconds: all five, with a warm-up each, take less than 3 s together.
_MOST_SECONDS = 0.25


def measure_copy(device: str, direction: Direction, *, size_bytes: int | None = None) -> Measurement:
    """Measure the bytes per second of one copy between host and device; to pageable memory, it is allocated anew.

    Raises:
        RuntimeError: the device has no such memory, or too little of it is free (torch's own errors).
    """
    import torch

    is_host = _is_cpu(device)
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


def measure_products(device: str, dtype: str, *, sides: Sequence[int] = ()) -> list[Measurement]:
    """Measure the operations per second of square matrix products in a torch dtype; a multiply-add counts as two.

    Of three sizes, the smallest first; larger ones are left out where they would take too long, or too much memory.

    Raises:
        RuntimeError: the device cannot compute in it, or too little memory is free for one (torch's own errors).
    """
    import torch

    found: list[Measurement] = []
    for side in sides or (_PRODUCT_SIDES_CPU if _is_cpu(device) else _PRODUCT_SIDES):
        try:
            left, right = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
            rates = _rates(lambda: left @ right, torch, device, 2 * side**3)  # noqa: B023  called in this iteration
        except torch.OutOfMemoryError:
            if not found:
                raise
            break
        found.append(_summary(f"product_{dtype}_{side}", "operations/s", rates))
        if 8 * (2 * side**3) / min(rates) > _MOST_SECONDS:  # twice the side is eight times the work
            break
    return found


def measure_attention(device: str, dtype: str, head_size: int, *, tokens: int | None = None) -> Measurement:
    """Measure the operations per second of torch's attention without a mask, for heads of this size.

    Raises:
        RuntimeError: the device cannot compute it, or too little memory is free (torch's own errors).
    """
    import torch

    heads = _HEADS_CPU if _is_cpu(device) else _HEADS
    length = tokens or (_TOKENS_CPU if _is_cpu(device) else _TOKENS)
    given = torch.randn(1, heads, length, head_size, device=device).to(getattr(torch, dtype))
    attention = torch.nn.functional.scaled_dot_product_attention
    flops = 2 * heads * length**2 * (head_size + head_size)  # the scores, and their product with the values
    rates = _rates(lambda: attention(given, given, given), torch, device, flops)
    return _summary(f"attention_{dtype}_{head_size}", "operations/s", rates)


def measure_launch(device: str) -> Measurement:
    """Measure the seconds of one kernel launch in a small UNet of diffusers, the Python code around it included.

    Its tensors are too small to keep a device busy, so that it waits for the host, as it does in a pipeline.

    Raises:
        ImportError: without diffusers.
        RuntimeError: the device cannot compute it (torch's own errors).
    """
    import torch

    model, inputs = small_unet(device)
    with torch.no_grad():
        launches = _launches(lambda: model(**inputs))
        rates = _rates(lambda: model(**inputs), torch, device, launches)
    return _summary("launch", "s", [1 / rate for rate in rates])


def small_unet(device: str) -> tuple[Any, dict[str, Any]]:
    """A UNet of diffusers with every kind of its blocks but few channels, and the arguments of its forward."""
    import torch
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, attention_head_dim=8, sample_size=8,
    )  # fmt: skip
    dtype = torch.float32 if _is_cpu(device) else torch.float16
    model = torch.nn.Module.to(model, device, dtype).eval()  # diffusers' own warns of a list that is empty here
    shapes = {"sample": (1, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (1, 77, 32)}
    return model, {name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in shapes.items()}


def _launches(work: Callable[[], object]) -> int:
    """The kernels that `work` launches, by the simulation's rule: one for each operation that is no view."""
    from torch.utils._python_dispatch import TorchDispatchMode

    launches = 0

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal launches
            launches += not func.is_view
            return func(*args, **(kwargs or {}))

    with Count():  # type: ignore[no-untyped-call]
        work()
    return launches


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
    if not _is_cpu(device):
        torch.accelerator.synchronize(device)


def _is_cpu(device: str) -> bool:
    return device.partition(":")[0] == "cpu"


def _summary(what: str, unit: Literal["bytes/s", "operations/s", "s"], rates: list[float]) -> Measurement:
    three = (float(f"{rate:.4g}") for rate in (median(rates), min(rates), max(rates)))
    middle, least, most = three
    return Measurement(what=what, unit=unit, median=middle, least=least, most=most, runs=len(rates))
