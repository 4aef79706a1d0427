"""Small files of the system, read without ever failing. Tests move the root to a recorded machine."""

from __future__ import annotations

import re
from pathlib import Path, PurePath

ROOT = Path("/")
_NUMBER = re.compile(r"[0-9]{1,20}")  # 64 bits; more is no size, and int() refuses thousands of digits


def at(path: str | PurePath) -> Path:
    """Where an absolute path of the system lies."""
    return ROOT / str(path).lstrip("/")


def read(path: Path) -> str | None:
    """The file's text without the space around it; None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except (OSError, ValueError):
        return None


def read_bytes(path: Path) -> bytes:
    """The file's bytes; none where it cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError):
        return b""


def number(path: Path) -> int | None:
    """The whole number in the file; None where there is none (`max`, an empty or a missing file)."""
    return as_number(read(path))


def as_number(text: str | None) -> int | None:
    """The whole number that the text is, None for anything else."""
    return int(text) if text is not None and _NUMBER.fullmatch(text) else None


def read_table(path: Path) -> dict[str, int]:
    """The lines `key number` of a file (`memory.stat`, a topology node), colons and units left off."""
    pairs = (line.split() for line in (read(path) or "").splitlines())
    found = {words[0].rstrip(":"): as_number(words[1]) for words in pairs if len(words) >= 2}
    return {key: value for key, value in found.items() if value is not None}


def entries(folder: Path, pattern: str) -> list[Path]:
    """What the folder holds by that pattern, sorted; nothing where it may not be listed."""
    try:
        return sorted(folder.glob(pattern))
    except (OSError, ValueError):
        return []


def exists(path: Path) -> bool:
    """Whether it is there, as far as this process may see."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether it is a folder, as far as this process may see."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def resolved(path: Path) -> Path | None:
    """Where the links lead; None where they lead nowhere, or round in a circle."""
    try:
        return path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        return None
