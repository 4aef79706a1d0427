"""Read small system files without raising. Tests move the root to a recorded machine."""

from __future__ import annotations

import re
from pathlib import Path, PurePath

ROOT = Path("/")
_NUMBER = re.compile(r"[0-9]{1,20}")  # 64 bits; no size has more, and int() refuses thousands of digits


def system_path(path: str | PurePath) -> Path:
    """The location of an absolute system path below `ROOT`."""
    return ROOT / str(path).lstrip("/")


def read_text(path: Path) -> str | None:
    """The file's text without surrounding whitespace; None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except (OSError, ValueError):
        return None


def read_bytes(path: Path) -> bytes:
    """The file's bytes; empty if it cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError):
        return b""


def read_number(path: Path) -> int | None:
    """The whole number in the file; None for other content (`max`) and for an empty or missing file."""
    return parse_number(read_text(path))


def parse_number(text: str | None) -> int | None:
    """The text as a whole number; None for anything else."""
    return int(text) if text is not None and _NUMBER.fullmatch(text) else None


def read_table(path: Path) -> dict[str, int]:
    """The `key number` lines of a file (`memory.stat`, a topology node), without colons and units."""
    pairs = (line.split() for line in (read_text(path) or "").splitlines())
    found = {words[0].rstrip(":"): parse_number(words[1]) for words in pairs if len(words) >= 2}
    return {key: value for key, value in found.items() if value is not None}


def list_folder(folder: Path, pattern: str) -> list[Path]:
    """The folder's entries that match the pattern, sorted; empty if it cannot be listed."""
    try:
        return sorted(folder.glob(pattern))
    except (OSError, ValueError):
        return []


def exists(path: Path) -> bool:
    """Whether the path exists and is visible to this process."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether the path is a folder visible to this process."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def resolve(path: Path) -> Path | None:
    """The path with links resolved; None if they lead nowhere or in a circle."""
    try:
        return path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        return None
