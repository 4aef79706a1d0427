"""The disk that weights would be offloaded to."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vramplan.hardware.mounts import Mount, mounts
from vramplan.hardware.sysroot import at, exists, read, resolved

_IN_MEMORY = ("tmpfs", "ramfs")
_VIRTUAL = ("vd", "xvd")  # virtio and Xen


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """What is free on it, its file system, whether that is memory in truth, and whether the disk turns."""

    free_bytes: int | None
    filesystem: str | None
    in_memory: bool
    rotational: bool | None


def offload_folder() -> Path:
    """Where weights are offloaded to: `VRAMPLAN_OFFLOAD`, else a folder in the user's cache."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("VRAMPLAN_OFFLOAD") or user_cache_path("vramplan") / "offload")


def read_disk() -> Disk:
    """The disk of the first folder on the way to the offload folder that exists."""
    try:
        folder = Path(os.path.abspath(offload_folder()))
    except OSError:  # a relative name in a folder that is gone
        return Disk(free_bytes=None, filesystem=None, in_memory=False, rotational=None)
    folder = next((path for path in (folder, *folder.parents) if exists(at(path))), folder)
    mount = _mount_of(PurePosixPath(folder.as_posix()))
    filesystem = mount.filesystem if mount else None
    return Disk(
        free_bytes=_free(at(folder)),
        filesystem=filesystem,
        in_memory=filesystem in _IN_MEMORY,
        rotational=_rotational(mount) if mount and filesystem not in _IN_MEMORY else None,
    )


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except (OSError, ValueError):
        return None


def _mount_of(folder: PurePosixPath) -> Mount | None:
    """The mount the folder lies on: the longest, of equals the last, which hides the others."""
    holding = [mount for mount in mounts() if folder.is_relative_to(mount.point)]
    return max(reversed(holding), key=lambda mount: len(mount.point.parts), default=None)


def _rotational(mount: Mount) -> bool | None:
    """What the kernel says of the disk; None for a network, an overlay, or several disks behind one name.

    The disks of virtual machines all say they turn, as nobody told them: that is no answer.
    https://docs.kernel.org/block/queue-sysfs.html
    """
    for link in _devices(mount):
        device = resolved(link)
        if device is None:
            continue
        for holder in (device, device.parent):  # a partition has no queue of its own
            answer = read(holder / "queue" / "rotational")
            if answer in ("0", "1") and not (answer == "1" and holder.name.startswith(_VIRTUAL)):
                return answer == "1"
    return None


def _devices(mount: Mount) -> tuple[Path, ...]:
    """By number, and by name where the file system has a number of its own (btrfs)."""
    by_number = at(f"/sys/dev/block/{mount.device}")
    if not mount.source.startswith("/dev/"):
        return (by_number,)
    return by_number, at(f"/sys/class/block/{PurePosixPath(mount.source).name}")
