"""The host's memory, swap, page-locked memory, cores and disk, as far as this process may use them."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator

from vramplan.hardware.cgroup import Limit, core_limits, memory_limits, swap_limits
from vramplan.hardware.disk import offload_folder, read_disk
from vramplan.hardware.sysroot import parse_number, read_table, read_text, system_path
from vramplan.hardware.system import is_windows, is_wsl, system_name
from vramplan.hardware.types import Host
from vramplan.units import GIB, KIB, MIB

__all__ = ["host_notes", "offload_folder", "read_host"]

# Windows' driver model lets programs page-lock about half of the memory (FlashML-org/FreeToken#112); ComfyUI uses two
# fifths (Comfy-Org/ComfyUI#15944), and so does vramplan.
_WINDOWS_PINNED_SHARE = 0.4
# In WSL2 the limit is small and varies: 500 MB in Docker (microsoft/WSL#14078), 0.75 to 1 GiB of a 62.8 GiB machine
# (FlashML-org/FreeToken#233). The smallest reported.
_WSL_PINNED = 500 * 1000**2

# Kept free on the disk that weights are offloaded to, in bytes. Assumed.
DISK_LEFT_FREE = 1 * GIB


def read_host(device_nodes: frozenset[int] = frozenset()) -> Host:
    """Read the host as it is now, in bytes. Limits may change while the program runs, so do not cache it.

    `device_nodes` are NUMA nodes made of an accelerator's memory, which the kernel counts as the system's.
    """
    total, available = _subtract_nodes(*_memory(), device_nodes)
    limits = [limit for limit in (*memory_limits(), *_process_limits()) if limit.limit_bytes < total]
    tightest = min(limits, key=lambda limit: limit.limit_bytes, default=None)
    usable = min([available, *(limit.left_bytes for limit in limits)])
    swap_total, swap_free = _swap()
    pinned, pinned_source = _pinned_limit(total)
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
    """Notes on the host: memory that could not be read, and a disk that is in memory."""
    if not host.total_bytes:
        yield "host: how much memory there is could not be read: say how much may be used with `ram`"
    if host.disk_in_memory:
        yield (
            f"host: weights offloaded to {host.disk_filesystem} would stay in RAM: "
            "name a folder on a disk with VRAMPLAN_OFFLOAD"
        )


def _memory() -> tuple[int, int]:
    """Total and available memory of the machine; 0 and 0 if neither can be read."""
    try:
        import psutil

        memory = psutil.virtual_memory()
        return int(memory.total), int(memory.available)
    except Exception:  # psutil raises many types on a broken /proc
        return _memory_by_pages()


def _memory_by_pages() -> tuple[int, int]:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0, 0


def _subtract_nodes(total: int, available: int, nodes: frozenset[int]) -> tuple[int, int]:
    """Total and available memory without that of devices: on coherent machines (GH200, GB200) each device's memory is a
    node without processors, and every count of the system's memory includes it (bytedance/xpu-perf#129)."""
    for node in nodes:
        folder = system_path(f"/sys/devices/system/node/node{node}")
        if read_text(folder / "cpulist") == "":
            facts = _node_memory(read_text(folder / "meminfo") or "")
            total -= facts.get("MemTotal", 0)
            available -= facts.get("MemFree", 0) + facts.get("FilePages", 0)
    return max(0, total), max(0, min(available, total))


def _node_memory(text: str) -> dict[str, int]:
    """Parse the lines `Node 1 MemTotal:  100 kB` into bytes by name."""
    lines = (line.replace(":", " ").split() for line in text.splitlines())
    return {words[2]: (parse_number(words[3]) or 0) * KIB for words in lines if len(words) > 3}


def _process_limits() -> Iterator[Limit]:
    """The limits of `ulimit -v` and `ulimit -d`: batch systems set them, and allocations beyond them fail."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = read_table(system_path("/proc/self/status"))
    for name, key, source in (("RLIMIT_AS", "VmSize", "ulimit -v"), ("RLIMIT_DATA", "VmData", "ulimit -d")):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit not in (resource.RLIM_INFINITY, -1):
            left = max(0, limit - used.get(key, 0) * KIB)
            yield Limit(limit_bytes=limit, left_bytes=left, source=source)


def _swap() -> tuple[int | None, int | None]:
    """Total and free swap that this process may use; None and None if it cannot be read."""
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


def _pinned_limit(total: int) -> tuple[int | None, str | None]:
    """The most page-locked bytes, and the source; None if only the memory itself is known to limit them.

    `ulimit -l` is ignored: no driver was found to obey it (microsoft/WSL#14078 fails with it unlimited).
    """
    if is_wsl():
        return min(_WSL_PINNED, total), "assumed: the least that was seen inside WSL2"
    if is_windows():
        return int(total * _WINDOWS_PINNED_SHARE) // MIB * MIB, "assumed: two fifths of the RAM on Windows"
    return None, None


def _cores() -> tuple[int | None, str | None]:
    """The number of cores this process may use, and the source of the limit if they are not all."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        allowed = os.cpu_count() or 0
    every = os.cpu_count() or allowed
    for quota, source in sorted(core_limits()):
        if quota < allowed:
            return math.ceil(quota), source
    return allowed or None, "processor affinity" if allowed < every else None
