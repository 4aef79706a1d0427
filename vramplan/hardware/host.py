"""What this process may use of the host: memory, swap, pinned memory, cores and disk."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator

from vramplan.hardware.cgroup import Limit, core_limits, memory_limits, swap_limits
from vramplan.hardware.disk import offload_folder, read_disk
from vramplan.hardware.sysroot import as_number, at, read, read_table
from vramplan.hardware.system import is_windows, is_wsl, system_name
from vramplan.hardware.types import Host
from vramplan.units import KIB, MIB

__all__ = ["host_notes", "offload_folder", "read_host"]

# Windows' driver model lets programs pin about half of the memory (FlashML-org/FreeToken#112); ComfyUI relies on
# two fifths (Comfy-Org/ComfyUI#15944), and so do we.
_WINDOWS_PINNED_SHARE = 0.4
# Inside WSL2 it is little and varies: 500 MB in Docker (microsoft/WSL#14078), 0.75 to 1 GiB of a 62.8 GiB
# machine (FlashML-org/FreeToken#233). The least that was seen.
_WSL_PINNED = 500 * 1000**2


def read_host(device_nodes: frozenset[int] = frozenset()) -> Host:
    """The host now, in bytes. Limits may change while the program runs: read it anew each time.

    `device_nodes` are NUMA nodes that are an accelerator's memory, which the kernel counts among its own.
    """
    total, available = _without_nodes(*_memory(), device_nodes)
    limits = [limit for limit in (*memory_limits(), *_process_limits()) if limit.limit_bytes < total]
    tightest = min(limits, key=lambda limit: limit.limit_bytes, default=None)
    usable = min([available, *(limit.left_bytes for limit in limits)])
    swap_total, swap_free = _swap()
    pinned, pinned_source = _pinned(total)
    cores, cores_source = _cores()
    disk = read_disk()
    return Host(
        total_bytes=total,
        available_bytes=usable,
        limit_bytes=tightest.limit_bytes if tightest else None,
        limit_source=tightest.source if tightest else None,
        system=system_name(),
        swap_total_bytes=swap_total,
        swap_free_bytes=swap_free,
        pinned_limit_bytes=pinned,
        pinned_source=pinned_source,
        cores=cores,
        cores_source=cores_source,
        disk_free_bytes=disk.free_bytes,
        disk_filesystem=disk.filesystem,
        disk_in_memory=disk.in_memory,
        disk_rotational=disk.rotational,
    )


def host_notes(host: Host) -> Iterator[str]:
    """What of the host is not as it seems."""
    if not host.total_bytes:
        yield "host: how much memory there is could not be read: say how much may be used with `ram`"
    if host.disk_in_memory:
        yield (
            f"host: weights offloaded to {host.disk_filesystem} would stay in RAM: "
            "name a folder on a disk with VRAMPLAN_OFFLOAD"
        )


def _memory() -> tuple[int, int]:
    """The machine's memory and what is available of it; 0 and 0 where nothing tells."""
    try:
        import psutil

        memory = psutil.virtual_memory()
        return int(memory.total), int(memory.available)
    except Exception:  # psutil raises whatever a broken /proc makes it stumble over
        return _memory_by_pages()


def _memory_by_pages() -> tuple[int, int]:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0, 0


def _without_nodes(total: int, available: int, nodes: frozenset[int]) -> tuple[int, int]:
    """The memory without that of devices: on coherent machines (GH200, GB200) each is a node without processors,
    and every count of the system's memory holds it (bytedance/xpu-perf#129)."""
    for node in nodes:
        folder = at(f"/sys/devices/system/node/node{node}")
        if read(folder / "cpulist") == "":
            facts = _node_memory(read(folder / "meminfo") or "")
            total -= facts.get("MemTotal", 0)
            available -= facts.get("MemFree", 0) + facts.get("FilePages", 0)
    return max(0, total), max(0, min(available, total))


def _node_memory(text: str) -> dict[str, int]:
    """The lines `Node 1 MemTotal:  100 kB` as bytes by name."""
    lines = (line.replace(":", " ").split() for line in text.splitlines())
    return {words[2]: (as_number(words[3]) or 0) * KIB for words in lines if len(words) > 3}


def _process_limits() -> Iterator[Limit]:
    """What `ulimit -v` and `ulimit -d` leave: batch systems set them, and past them an allocation fails."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = read_table(at("/proc/self/status"))
    for name, key, source in (("RLIMIT_AS", "VmSize", "ulimit -v"), ("RLIMIT_DATA", "VmData", "ulimit -d")):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit not in (resource.RLIM_INFINITY, -1):
            left = max(0, limit - used.get(key, 0) * KIB)
            yield Limit(limit_bytes=limit, left_bytes=left, source=source)


def _swap() -> tuple[int | None, int | None]:
    """Swap in all and free, as far as this process may use it."""
    try:
        import psutil

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of statistics that containers do not show
            swap = psutil.swap_memory()
        total, free = int(swap.total), int(swap.free)
    except Exception:
        return None, None
    limits = list(swap_limits())
    return (
        min([total, *(limit.limit_bytes for limit in limits)]),
        min([free, *(limit.left_bytes for limit in limits)]),
    )


def _pinned(total: int) -> tuple[int | None, str | None]:
    """What may be pinned for copies; None where nothing but the memory itself is known to limit it.

    `ulimit -l` is none: no driver was found to go by it (microsoft/WSL#14078 fails with it unlimited).
    """
    if is_wsl():
        return min(_WSL_PINNED, total), "assumed: the least that was seen inside WSL2"
    if is_windows():
        return int(total * _WINDOWS_PINNED_SHARE) // MIB * MIB, "assumed: two fifths of the RAM on Windows"
    return None, None


def _cores() -> tuple[int | None, str | None]:
    """The cores this process may run on, and what limits them where they are not all."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        allowed = os.cpu_count() or 0
    every = os.cpu_count() or allowed
    for quota, source in sorted(core_limits()):
        if quota < allowed:
            return math.ceil(quota), source
    return allowed or None, "processor affinity" if allowed < every else None
