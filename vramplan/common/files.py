"""Write files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vramplan.errors import VramplanError


def write_text(path: str | Path, text: str) -> None:
    """Write the whole file in UTF-8 or nothing, as `write_bytes` does."""
    try:
        content = text.encode()
    except UnicodeError as error:
        raise VramplanError(f"{path}: cannot be written ({error})") from error
    write_bytes(path, content)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write the whole file or nothing: to a temporary name in the same folder, then renamed.

    Raises:
        VramplanError: the folder is missing, not writable, or full; an older file is left as it was.
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
    """Where simulations, measured speeds and facts of the hub are kept; None where the cache is switched off."""
    told = os.environ.get("VRAMPLAN_CACHE")
    if told == "0":
        return None
    if told:
        return Path(told)
    from platformdirs import user_cache_path

    return user_cache_path("vramplan") / "simulations"
