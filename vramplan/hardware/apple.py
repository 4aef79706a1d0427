"""The GPU of an Apple silicon Mac, which shares the host's memory."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator

from vramplan.hardware.types import Accelerator, Host
from vramplan.units import GIB, MIB

_KEYS = ("machdep.cpu.brand_string", "iogpu.wired_limit_mb")


def probe(host: Host) -> Iterator[Accelerator | str]:
    """The Mac's GPU, with a note that its share of the memory is assumed; nothing elsewhere."""
    if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        return
    answers = _sysctl()
    limit = int(answers.get("iogpu.wired_limit_mb", "0")) * MIB
    total = limit or working_set(host.total_bytes)
    if not limit:
        yield "apple: the GPU's share of memory is assumed; torch.mps.recommended_max_memory() tells Metal's"
    yield Accelerator(
        kind="mps",
        index=0,
        name=answers.get("machdep.cpu.brand_string", "Apple GPU"),
        total_bytes=total,
        free_bytes=min(total, host.available_bytes),
        unified=True,
    )


def working_set(memory_bytes: int) -> int:
    """The bytes Metal recommends to use at most, of a Mac with that much memory.

    Metal's recommendedMaxWorkingSetSize was seen to be two thirds of 16 GiB (abetlen/llama-cpp-python#687)
    and of 32 GiB (ggml-org/llama.cpp#2011), three quarters of 64 GiB (ggml-org/llama.cpp#1870), and more of
    128 GiB on newer systems (antirez/ds4#893). Assumed in between, on the low side.
    https://developer.apple.com/documentation/metal/mtldevice/recommendedmaxworkingsetsize
    """
    return memory_bytes * 3 // 4 if memory_bytes >= 64 * GIB else memory_bytes * 2 // 3


def _sysctl() -> dict[str, str]:
    """The keys that this system knows, with their values; a wired limit of 0 is the system's own choice."""
    try:
        result = subprocess.run(["/usr/sbin/sysctl", *_KEYS], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = (line.partition(": ") for line in result.stdout.splitlines())
    return {key: value.strip() for key, _, value in pairs}
