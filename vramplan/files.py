"""Write files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vramplan.errors import VramplanError


def write_text(path: str | Path, text: str) -> None:
    """Write the whole file or nothing: to a temporary name in the same folder, then renamed.

    Raises:
        VramplanError: the folder is missing, not writable, or full; an older file is left as it was.
    """
    target = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VramplanError(f"{path}: cannot be written ({reason})") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
