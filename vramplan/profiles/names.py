"""Find a profile by its name, without reading any."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from vramplan.errors import UsageError
from vramplan.profiles.files import ProfileKind, profile_files


def profile_path(kind: ProfileKind, name: str) -> Path:
    """Return the file of a profile; the name is case-insensitive.

    Raises:
        UsageError: no profile has that name; the message suggests the nearest ones.
    """
    path = find_profile(kind, name)
    if path is None:
        raise unknown_name(kind, name, sorted(profile_files(kind)))
    return path


def find_profile(kind: ProfileKind, name: str) -> Path | None:
    """The file of a profile, None if no profile has that name."""
    wanted = name.strip().casefold()
    return next((path for stem, path in profile_files(kind).items() if stem.casefold() == wanted), None)


def unknown_name(kind: ProfileKind, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is none of those known: it suggests the nearest ones."""
    wanted = name.strip().casefold()
    spelled = {candidate.casefold(): candidate for candidate in known}
    # Names that contain the text come first: by similarity alone, a100 is nearer to a10 than to a100-40gb.
    longer = (key for key in spelled if wanted and wanted in key)
    near = tuple(dict.fromkeys((*longer, *difflib.get_close_matches(wanted, spelled, cutoff=0.5))))[:3]
    listed = [spelled[key] for key in near or spelled]
    advice = f"did you mean {' or '.join(listed)}?" if near else f"there are {', '.join(listed)}"
    return UsageError(f"no {kind.removesuffix('s')} profile {name!r}: {advice}")
