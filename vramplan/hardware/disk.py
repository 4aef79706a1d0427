"""The disk that weights are offloaded to."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vramplan.hardware.mounts import Mount, mounts
from vramplan.hardware.sysroot import exists, read_text, resolve, system_path

_IN_MEMORY = ("tmpfs", "ramfs")
_VIRTUAL = ("vd", "xvd")  # virtio and Xen


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk: free bytes, file system, whether that is backed by memory, and whether the disk is rotational."""

    free_bytes: int | None
    filesystem: str | None
    in_memory: bool
    rotational: bool | None


def offload_folder() -> Path:
    """The folder weights are offloaded to: `VRAMPLAN_OFFLOAD`, else a folder in the user's cache."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("VRAMPLAN_OFFLOAD") or user_cache_path("vramplan") / "offload")


def read_disk() -> Disk:
    """Read the disk of the offload folder, or of its nearest existing parent."""
    try:
        folder = Path(os.path.abspath(offload_folder()))
    except OSError:  # a relative path in a deleted folder
        return Disk(free_bytes=None, filesystem=None, in_memory=False, rotational=None)
    folder = next((path for path in (folder, *folder.parents) if exists(system_path(path))), folder)
    mount = _mount_of(PurePosixPath(folder.as_posix()))
    filesystem = mount.filesystem if mount else None
    return Disk(
        free_bytes=_free(system_path(folder)),
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
    """The mount of the folder: the longest path, and of equal ones the last, which hides the others."""
    holding = [mount for mount in mounts() if folder.is_relative_to(mount.point)]
    return max(reversed(holding), key=lambda mount: len(mount.point.parts), default=None)


def _rotational(mount: Mount) -> bool | None:
    """Whether the disk is rotational by the kernel; None for a network, an overlay, or several disks behind one name.

    Disks of virtual machines report rotational by default, whatever they are: that is ignored.
    https://docs.kernel.org/block/queue-sysfs.html
    """
    for link in _devices(mount):
        device = resolve(link)
        if device is None:
            continue
        for holder in (device, device.parent):  # a partition has no queue of its own
            answer = read_text(holder / "queue" / "rotational")
            if answer in ("0", "1") and not (answer == "1" and holder.name.startswith(_VIRTUAL)):
                return answer == "1"
    return None


def _devices(mount: Mount) -> tuple[Path, ...]:
    """Links to the device by number, and by name for file systems with a number of their own (btrfs)."""
    by_number = system_path(f"/sys/dev/block/{mount.device}")
    if not mount.source.startswith("/dev/"):
        return (by_number,)
    return by_number, system_path(f"/sys/class/block/{PurePosixPath(mount.source).name}")
