"""The mounts of this process, from `/proc/self/mountinfo`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from vramplan.hardware.sysroot import read_text, system_path

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One mount: `root` of the file system mounted at `point`, with its type, source, options and device number."""

    root: PurePosixPath
    point: PurePosixPath
    filesystem: str
    source: str
    options: tuple[str, ...]
    device: str


def mounts() -> list[Mount]:
    """All mounts, in the order they were made. Malformed lines are skipped.

    https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html
    """
    found = (_mount(line) for line in (read_text(system_path("/proc/self/mountinfo")) or "").splitlines())
    return [mount for mount in found if mount is not None]


def _mount(line: str) -> Mount | None:
    left, _, right = line.partition(" - ")
    place, kind = left.split(), right.split()
    if len(place) < 6 or len(kind) < 2:
        return None
    return Mount(
        root=PurePosixPath(_unescape(place[3])),
        point=PurePosixPath(_unescape(place[4])),
        filesystem=kind[0],
        source=_unescape(kind[1]),
        options=tuple(kind[2].split(",")) if len(kind) > 2 else (),
        device=place[2],
    )


def _unescape(text: str) -> str:
    """Replace the escapes of spaces and the like: three octal digits."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
