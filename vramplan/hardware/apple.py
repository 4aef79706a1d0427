"""The GPU of an Apple silicon Mac, which shares the host's memory."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Iterator

from vramplan.hardware.process_usage import metal_usage
from vramplan.hardware.sysroot import parse_number
from vramplan.hardware.types import Accelerator, Host, Reading
from vramplan.units import GIB, MIB

_KEYS = ("machdep.cpu.brand_string", "iogpu.wired_limit_mb")


def probe(host: Host) -> Iterator[Accelerator | str]:
    """Detect a Mac's GPU and the memory that Metal recommends to use; nothing on other systems."""
    if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        return
    answers = _sysctl()
    # The user's limit comes first: Metal's answer may be older than the limit.
    limit = (parse_number(answers.get("iogpu.wired_limit_mb")) or 0) * MIB
    total = limit or metal_working_set()
    if not total:
        total = working_set(host.total_bytes)
        yield "apple: the GPU's share of memory is assumed; torch.mps.recommended_max_memory() tells Metal's"
    total = min(total, host.total_bytes) or total
    readings = [Reading(source="available on the host", free_bytes=min(total, host.available_bytes))]
    reason = "the memory is the host's"
    own = metal_usage()
    if own is not None:
        held = own.allocated_bytes + own.cached_bytes
        readings.append(Reading(source="Metal, less this process' share", free_bytes=max(0, total - held)))
        reason = "the memory is the host's: the least of both"
    name = answers.get("machdep.cpu.brand_string") or "Apple GPU"
    yield Accelerator(
        kind="mps",
        index=0,
        name=name,
        total_bytes=total,
        free_bytes=min(reading.free_bytes for reading in readings),
        unified=True,
        architecture=name.removeprefix("Apple ") if name.startswith("Apple M") else None,
        native=_native(name),
        free_readings=tuple(readings),
        free_reason=reason,
        own=own,
    )


def working_set(memory_bytes: int) -> int:
    """The most bytes that Metal recommends to use on a Mac with that memory: an estimate.

    Metal's recommendedMaxWorkingSetSize was seen to be two thirds of 16 GiB (abetlen/llama-cpp-python#687)
    and of 32 GiB (ggml-org/llama.cpp#2011), three quarters of 64 GiB (ggml-org/llama.cpp#1870), and more of
    128 GiB on newer systems (antirez/ds4#893). Assumed in between, on the low side.
    https://developer.apple.com/documentation/metal/mtldevice/recommendedmaxworkingsetsize
    """
    return memory_bytes * 3 // 4 if memory_bytes >= 64 * GIB else memory_bytes * 2 // 3


def metal_working_set() -> int | None:
    """Metal's recommended working set in bytes, through the Objective-C run-time; None if it does not answer.

    Programs without a window must load CoreGraphics first, or there is no device
    (https://developer.apple.com/documentation/metal/mtlcreatesystemdefaultdevice()).
    """
    try:
        ctypes.CDLL("/System/Library/Frameworks/CoreGraphics.framework/CoreGraphics")
        metal = ctypes.CDLL("/System/Library/Frameworks/Metal.framework/Metal")
        runtime = ctypes.CDLL("/usr/lib/libobjc.A.dylib")
        metal.MTLCreateSystemDefaultDevice.restype = ctypes.c_void_p
        runtime.sel_registerName.restype = ctypes.c_void_p
        runtime.objc_msgSend.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        runtime.objc_msgSend.restype = ctypes.c_uint64
        device = metal.MTLCreateSystemDefaultDevice()
        if not device:
            return None
        return int(runtime.objc_msgSend(device, runtime.sel_registerName(b"recommendedMaxWorkingSetSize"))) or None
    except (OSError, AttributeError, ctypes.ArgumentError):
        return None


def _native(name: str) -> tuple[str, ...]:
    """The torch dtypes of the chip: bfloat16 (Metal 3.1) in hardware from the M2 on, float8 on none.

    https://developer.apple.com/metal/Metal-Shading-Language-Specification.pdf, and philipturner/metal-flash-attention
    on the emulation of bfloat16 on the M1.
    """
    if not name.startswith("Apple M"):
        return ("float32", "float16")
    return ("float32", "float16") if name.split()[1] == "M1" else ("float32", "float16", "bfloat16")


def _sysctl() -> dict[str, str]:
    """The values of the keys that this system has; a wired limit of 0 means the system's default."""
    try:
        result = subprocess.run(["/usr/sbin/sysctl", *_KEYS], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    pairs = (line.partition(": ") for line in result.stdout.splitlines())
    return {key: value.strip() for key, _, value in pairs}
