"""Parse CUDA_VISIBLE_DEVICES and the HIP and ROCr variables of the same grammar, without reading the machine."""

from __future__ import annotations

import re
from collections.abc import Sequence

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}(?![0-9])")
_NAMES = ("GPU-", "MIG-")


def visible_positions(text: str | None, uuids: Sequence[str | None]) -> list[int]:
    """Positions in `uuids` of the devices that stay visible, in the program's order.

    `text` is the variable's value, None if it is not set. The grammar is the driver's, as torch reads it
    (`_parse_visible_devices` in torch/cuda/__init__.py, 2.13): a list of numbers, or of `GPU-` or `MIG-` identifiers
    that may be abbreviated; the first invalid, negative or ambiguous entry ends it; a repeated entry empties it.
    """
    if text is None:
        return list(range(len(uuids)))
    prefix = text[:4]
    named = uses_identifiers(text)
    requested = [_by_uuid(entry, prefix, uuids) if named else _by_number(entry) for entry in text.split(",")]
    listed = requested[: requested.index(None)] if None in requested else requested
    if len(set(listed)) < len(listed):
        return []
    return _until_missing(listed, len(uuids))


def uses_identifiers(text: str | None) -> bool:
    """Whether the list has identifiers, not numbers."""
    return (text or "").startswith(_NAMES)


def _by_number(entry: str) -> int | None:
    """The number at the start of the entry (`1gpu` is 1, as strtoul reads it); None if there is none."""
    match = _INTEGER.match(entry.strip())
    return int(match[0]) if match and int(match[0]) >= 0 else None


def _by_uuid(entry: str, prefix: str, uuids: Sequence[str | None]) -> int | None:
    """The position of the only device whose identifier starts with the entry; None if there is not exactly one."""
    matches = [position for position, uuid in enumerate(uuids) if uuid and uuid.startswith(entry)]
    return matches[0] if entry.startswith(prefix) and len(matches) == 1 else None


def _until_missing(listed: list[int | None], count: int) -> list[int]:
    kept: list[int] = []
    for position in listed:
        if position is None or position >= count:
            break
        kept.append(position)
    return kept
