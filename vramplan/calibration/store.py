"""Store measurements, one line of JSON for each record. Damage costs a line and a note, never a call.

Appended lines and no database: one write to a file opened for appending is atomic among processes (POSIX, `write`),
needs no lock, works in a home directory on a network, where SQLite's shared-memory journal does not
(https://sqlite.org/wal.html, "all processes must be on the same host"), and a torn or edited line damages no other.
Where a file system breaks that promise, the mixed line is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vramplan.calibration.records import Record, from_line, to_line

# The bytes read of each file, from its end: some thousand calls.
_MOST_BYTES = 4 << 20
# A file without a readable line is left to its owner, and the next name is used.
_NAMES = ("calibration.jsonl", *(f"calibration-{number}.jsonl" for number in range(2, 10)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The records of this machine, oldest first, and notes on files and lines that could not be read."""

    records: tuple[Record, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _File:
    """The content of one file; `problem` says why it could not be opened."""

    path: Path
    records: tuple[Record, ...] = ()
    skipped: int = 0
    later: int = 0
    problem: str | None = None

    @property
    def damaged(self) -> bool:
        """Whether the file has content, but no readable line."""
        return self.problem is not None or (self.skipped > 0 and not self.records and not self.later)

    @property
    def note(self) -> str | None:
        if self.problem is not None:
            return f"{self.path} cannot be read ({self.problem}): what it holds plays no part"
        if self.damaged:
            return f"{self.path} holds no readable line: it is left as it is and plays no part"
        lines = "a line" if self.skipped == 1 else f"{self.skipped} lines"
        return f"{self.path}: {lines} could not be read and were skipped" if self.skipped else None


def store_folder() -> Path | None:
    """The folder of the store: `VRAMPLAN_CALIBRATION`, else the user's state directory; None for `0`, no store."""
    requested = os.environ.get("VRAMPLAN_CALIBRATION")
    if requested == "0":
        return None
    if requested:
        return Path(requested)
    from platformdirs import user_state_path

    return user_state_path("vramplan")


def read_store() -> Stored:
    """Read the measurements of this machine. Changes no file."""
    folder = store_folder()
    files = list(_files(folder)) if folder is not None else []
    return Stored(
        records=tuple(record for file in files for record in file.records),
        notes=tuple(file.note for file in files if file.note is not None),
    )


def append(record: Record) -> str | None:
    """Append a record to the store. Returns the problem as text, never raises it: a call must not fail over it."""
    folder = store_folder()
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = _writable(folder)
        # The leading end of line keeps the record whole if the one before it was cut off.
        problem = _write(path, b"\n" + to_line(record).encode() + b"\n")
    except (OSError, ValueError) as error:
        path, problem = folder, str(getattr(error, "strerror", None) or error)
    return None if problem is None else f"the measurement could not be kept in {path} ({problem})"


def _write(path: Path, data: bytes) -> str | None:
    """Write the data in one call, so that lines of processes do not mix; one cut off by a full disk is not retried."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
    try:
        return None if os.write(handle, data) == len(data) else "the disk is full"
    finally:
        os.close(handle)


def _writable(folder: Path) -> Path:
    damaged = {file.path for file in _files(folder) if file.damaged}
    for name in _NAMES:
        if folder / name not in damaged:
            return folder / name
    raise OSError(f"all of {_NAMES[0]} to {_NAMES[-1]} are damaged: move them away")


def _files(folder: Path) -> Iterator[_File]:
    for name in _NAMES:
        try:
            yield _parsed(folder / name, _tail(folder / name))
        except FileNotFoundError:
            continue
        except OSError as error:
            yield _File(folder / name, problem=error.strerror or str(error))


def _tail(path: Path) -> bytes:
    """The last `_MOST_BYTES` of the file, in whole lines: without a last line that is still being written."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _MOST_BYTES))
        data = file.read(_MOST_BYTES)
    if size > _MOST_BYTES:
        data = data.partition(b"\n")[2]
    whole, end, rest = data.rpartition(b"\n")
    return whole if end else rest


def _parsed(path: Path, data: bytes) -> _File:
    records: list[Record] = []
    skipped = later = 0
    for line in data.split(b"\n"):
        if not line.strip():
            continue
        try:
            record = from_line(line.decode())
        except (ValueError, RecursionError):
            skipped += 1
            continue
        later += record is None
        records += [] if record is None else [record]
    return _File(path, tuple(records), skipped, later)
