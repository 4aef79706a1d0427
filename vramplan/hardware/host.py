"""The memory this process may use: the machine's, or less where a control group limits it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vramplan.hardware.types import Host

_SELF = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Version:
    """How one version of control groups spells what is read of it."""

    name: str
    limits: tuple[str, ...]
    usage: str
    reclaimable: str


# memory.high does not kill, but above it the kernel slows the group until it hardly moves: no less a limit.
# https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
_V2 = _Version(name="v2", limits=("memory.max", "memory.high"), usage="memory.current", reclaimable="inactive_file")
# https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
_V1 = _Version(
    name="v1",
    limits=("memory.limit_in_bytes",),
    usage="memory.usage_in_bytes",
    reclaimable="total_inactive_file",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limit:
    """One limit, and what is left below it."""

    limit_bytes: int
    left_bytes: int
    source: str


def read_host(*, self_cgroup: Path = _SELF, mount: Path = _MOUNT) -> Host:
    """The host's memory now, in bytes. Limits may change while the program runs: read it anew each time."""
    import psutil

    memory = psutil.virtual_memory()
    limits = [limit for limit in _limits(self_cgroup, mount) if limit.limit_bytes < memory.total]
    tightest = min(limits, key=lambda limit: limit.limit_bytes, default=None)
    return Host(
        total_bytes=memory.total,
        available_bytes=min([memory.available, *(limit.left_bytes for limit in limits)]),
        limit_bytes=tightest.limit_bytes if tightest else None,
        limit_source=tightest.source if tightest else None,
        disk_free_bytes=_disk_free(),
    )


def _disk_free() -> int | None:
    """What is free where weights would be offloaded to: in the first folder on the way there that exists."""
    folder = offload_folder()
    try:
        return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    except (OSError, StopIteration):
        return None


def offload_folder() -> Path:
    """Where weights are offloaded to: `VRAMPLAN_OFFLOAD`, else a folder in the user's cache."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("VRAMPLAN_OFFLOAD") or user_cache_path("vramplan") / "offload")


def _limits(self_cgroup: Path, mount: Path) -> Iterator[_Limit]:
    """Every limit on this process: its own group's and its ancestors', as each of them binds."""
    for line in (_read(self_cgroup) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield from _ancestry(_V1, mount / "memory", _group(path))
        elif not controllers:
            yield from _ancestry(_V2, mount, _group(path))


def _group(path: str) -> PurePosixPath:
    """The group; the root for one outside this process's view (`/../other`), whose path leads nowhere."""
    group = PurePosixPath(path)
    return PurePosixPath("/") if ".." in group.parts else group


def _ancestry(version: _Version, root: Path, path: PurePosixPath) -> Iterator[_Limit]:
    """The limits from the group up to the root.

    A container may show the host's path while only its own group is mounted, at the root: directories that
    are not there are passed over, and the root is always asked.
    """
    for group in (path, *path.parents):
        directory = root / group.relative_to("/")
        for name in version.limits:
            limit = _number(directory / name)
            if limit is not None:
                yield _Limit(
                    limit_bytes=limit,
                    left_bytes=max(0, limit - _working_set(version, directory)),
                    source=f"cgroup {version.name} {name} at {group}",
                )


def _working_set(version: _Version, directory: Path) -> int:
    """What the group uses and cannot give back: pages of files not lately read are dropped first.

    Kubernetes counts so too (https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/).
    Without it a checkpoint that was read once would look like memory in use.
    """
    statistics = dict(line.split() for line in (_read(directory / "memory.stat") or "").splitlines())
    used = _number(directory / version.usage) or 0
    return max(0, used - int(statistics.get(version.reclaimable, "0")))


def _number(path: Path) -> int | None:
    """The number in the file; None where there is no such file, or it says `max`."""
    text = _read(path)
    return int(text) if text and text.isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
