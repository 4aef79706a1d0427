"""Limits of control groups on memory, swap and cores: versions 1 and 2, nested groups and containers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vramplan.hardware.mounts import mounts
from vramplan.hardware.sysroot import is_folder, parse_number, read_number, read_table, read_text, system_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One limit and the memory left below it, in bytes, and its source."""

    limit_bytes: int
    left_bytes: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Version:
    """The file and key names of one version of control groups."""

    name: str
    limits: tuple[str, ...]
    usage: str
    clean: tuple[str, ...]
    dirty: tuple[str, ...]


# memory.high does not kill, but above it the kernel throttles the group heavily: it counts as a limit too.
# https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
_V2 = _Version(
    name="v2",
    limits=("memory.max", "memory.high"),
    usage="memory.current",
    clean=("active_file", "inactive_file"),
    dirty=("file_dirty", "file_writeback"),
)
# https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
_V1 = _Version(
    name="v1",
    limits=("memory.limit_in_bytes",),
    usage="memory.usage_in_bytes",
    clean=("total_active_file", "total_inactive_file"),
    dirty=("total_dirty", "total_writeback"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """The process' group or an ancestor: its directory, and its name within the mount."""

    version: _Version
    directory: Path
    name: str
    own: bool  # the process is in this group itself


def memory_limits() -> Iterator[Limit]:
    """Every limit on this process' memory: of its own group and of the ancestors, which all apply."""
    for group in _groups("memory"):
        used = _working_set(group)
        for name in group.version.limits:
            limit = read_number(group.directory / name)
            if limit is not None:
                yield _limit(group, name, limit, used)
        # Version 1 reports the tightest limit of the ancestors, including those outside a container's view.
        hidden = read_table(group.directory / "memory.stat").get("hierarchical_memory_limit")
        if hidden is not None and group.own:
            yield _limit(group, "hierarchical_memory_limit", hidden, used)


def _limit(group: _Group, name: str, limit: int, used: int) -> Limit:
    source = f"cgroup {group.version.name} {name} at {group.name}"
    return Limit(limit_bytes=limit, left_bytes=max(0, limit - used), source=source)


def _working_set(group: _Group) -> int:
    """The bytes of the group that cannot be reclaimed: clean file pages are dropped before anything is killed.

    If they were counted, a checkpoint read once would look like memory in use: 68.9 GiB of a container's 70
    (kekzl/imp#2070), of which 15.7 were on the active list. The kernel's own MemAvailable counts both lists as free.
    """
    statistics = read_table(group.directory / "memory.stat")
    clean = sum(statistics.get(name, 0) for name in group.version.clean)
    dirty = sum(statistics.get(name, 0) for name in group.version.dirty)
    used = read_number(group.directory / group.version.usage) or 0
    return max(0, used - max(0, clean - dirty))


def swap_limits() -> Iterator[Limit]:
    """Every limit on this process' swap. Version 1 limits memory and swap together."""
    for group in _groups("memory"):
        if group.version is _V2:
            name, limit = "memory.swap.max", read_number(group.directory / "memory.swap.max")
            used = read_number(group.directory / "memory.swap.current") or 0
        else:
            name, both = "memory.memsw.limit_in_bytes", read_number(group.directory / "memory.memsw.limit_in_bytes")
            memory = read_number(group.directory / "memory.limit_in_bytes")
            limit = None if both is None or memory is None else max(0, both - memory)
            # Without a limit both are the same huge number: swap is not limited, rather than 0.
            limit = None if both is not None and both >= 1 << 60 else limit
            used = read_table(group.directory / "memory.stat").get("total_swap", 0)
        if limit is not None:
            yield _limit(group, name, limit, used)


def core_limits() -> Iterator[tuple[float, str]]:
    """Every quota of processor time on this process, in cores, and its source."""
    for group in _groups("cpu"):
        name = "cpu.max" if group.version is _V2 else "cpu.cfs_quota_us"
        words = (read_text(group.directory / name) or "").split()
        quota = parse_number(words[0]) if words else None
        period = parse_number(words[1]) if len(words) > 1 else read_number(group.directory / "cpu.cfs_period_us")
        if quota and period:
            yield quota / period, f"cgroup {group.version.name} {name} at {group.name}"


def _groups(controller: str) -> Iterator[_Group]:
    """This process' group and its ancestors, nearest first, in each hierarchy with that controller."""
    for line in (read_text(system_path("/proc/self/cgroup")) or "").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3 and controller in parts[1].split(","):
            yield from _ancestry(_V1, *_mount_point(controller), PurePosixPath(parts[2]))
        elif len(parts) == 3 and not parts[1]:
            yield from _ancestry(_V2, *_mount_point(None), PurePosixPath(parts[2]))


def _mount_point(controller: str | None) -> tuple[PurePosixPath, PurePosixPath]:
    """The mount point of the hierarchy and the group mounted there; the default place if no mount is listed."""
    for mount in mounts():
        if controller is None and mount.filesystem == "cgroup2":
            return mount.point, mount.root
        if controller is not None and mount.filesystem == "cgroup" and controller in mount.options:
            return mount.point, mount.root
    return PurePosixPath("/sys/fs/cgroup") / (controller or ""), PurePosixPath("/")


def _ancestry(version: _Version, point: PurePosixPath, shown: PurePosixPath, path: PurePosixPath) -> Iterator[_Group]:
    """The groups from the process' own up to the one at the mount.

    A container may show the host's path while only its own group is mounted, at the root: missing directories are
    skipped, and the root is always included. A path outside this process' view (`/../other`), or a relative one, is
    replaced by the root.
    """
    if ".." in path.parts or not path.is_absolute():
        path = PurePosixPath("/")
    elif shown != PurePosixPath("/") and path.is_relative_to(shown):
        path = PurePosixPath("/") / path.relative_to(shown)
    own = True
    for group in (path, *path.parents):
        directory = system_path(point / group.relative_to("/"))
        if is_folder(directory):
            yield _Group(version=version, directory=directory, name=str(group), own=own)
            own = False
