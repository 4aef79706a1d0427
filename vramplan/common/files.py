"""Atomic file writes, and the folder of the simulation cache."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vramplan.errors import VramplanError


def write_text(path: str | Path, text: str) -> None:
    """Write the text in UTF-8, atomically, as `write_bytes` does."""
    try:
        content = text.encode()
    except UnicodeError as error:
        raise VramplanError(f"{path}: cannot be written ({error})") from error
    write_bytes(path, content)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write the file atomically: to a temporary name in the same folder, then renamed.

    Raises:
        VramplanError: the folder is missing, not writable, or full; an existing file is left unchanged.
    """
    target = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise VramplanError(f"{path}: cannot be written ({reason})") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cache_folder() -> Path | None:
    """The folder of all that is cached: `VRAMPLAN_CACHE`, else in the user's cache; None if that is `0`, off."""
    requested = os.environ.get("VRAMPLAN_CACHE")
    if requested == "0":
        return None
    if requested:
        return Path(requested)
    from platformdirs import user_cache_path

    return user_cache_path("vramplan") / "simulations"
