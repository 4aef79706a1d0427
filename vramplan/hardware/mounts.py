"""What is mounted where: `/proc/self/mountinfo`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from vramplan.hardware.sysroot import at, read

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One mount: the part of the file system that is shown, where, what kind it is and what it comes from."""

    root: PurePosixPath
    point: PurePosixPath
    filesystem: str
    source: str
    options: tuple[str, ...]
    device: str


def mounts() -> list[Mount]:
    """All of them, in the order they were mounted. Lines that cannot be read are passed over.

    https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html
    """
    found = (_mount(line) for line in (read(at("/proc/self/mountinfo")) or "").splitlines())
    return [mount for mount in found if mount is not None]


def _mount(line: str) -> Mount | None:
    left, _, right = line.partition(" - ")
    place, kind = left.split(), right.split()
    if len(place) < 6 or len(kind) < 2:
        return None
    return Mount(
        root=PurePosixPath(_plain(place[3])),
        point=PurePosixPath(_plain(place[4])),
        filesystem=kind[0],
        source=_plain(kind[1]),
        options=tuple(kind[2].split(",")) if len(kind) > 2 else (),
        device=place[2],
    )


def _plain(text: str) -> str:
    """Spaces and the like are written as three octal digits."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
