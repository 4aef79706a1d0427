"""Parse and format byte counts, and format seconds. The only module that knows 1024."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vramplan.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

# A bare K, M, G or T is decimal (SI), like KB, MB, GB and TB; only the i makes it binary.
_FACTORS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _FACTORS |= {_letter: 1000**_power, f"{_letter}b": 1000**_power, f"{_letter}ib": 1 << (10 * _power)}

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?|\.\d+)\s*(?P<unit>[a-z]*)", re.IGNORECASE)


def format_bytes(count: int) -> str:
    """The count for a person, in GiB, MiB, KiB or B: `1.50 GiB`, `640 MiB`, `12 KiB`, `-0.25 GiB`."""
    size = abs(count)
    if size >= GIB // 10:
        return f"{count / GIB:.2f} GiB"
    if size >= MIB:
        return f"{count / MIB:.0f} MiB"
    return f"{count / KIB:.0f} KiB" if size >= KIB else f"{count} B"


def parse_bytes(text: str, *, name: str = "") -> int:
    """The bytes that `12GiB`, `12GB`, `12000M` or `512` stand for; a number without a unit is bytes.

    Raises:
        UsageError: `text` is not a size; the message begins with `name`.
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _FACTORS.get(match["unit"].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"{name and name + ' '}{text!r} is not a size: write it like 12GiB, 12GB or 12000M")
    return int(float(match["number"]) * factor)


def parse_amount(text: str, *, free_bytes: int | None, total_bytes: int | None, name: str = "size") -> int:
    """The bytes of a memory that an amount stands for.

    `12GiB` is an absolute size, `-1GiB` is the free memory minus one GiB, `85%` is a share of the total.

    Raises:
        UsageError: `text` is not an amount, comes to 0 or less, or refers to a memory of unknown size.
    """
    stripped = text.strip()
    if stripped.startswith("-"):
        count = _known(free_bytes, stripped, name) - parse_bytes(stripped[1:], name=name)
    elif stripped.endswith("%"):
        count = int(_known(total_bytes, stripped, name) * _percentage(stripped) / 100)
    else:
        count = parse_bytes(stripped, name=name)
    if count <= 0:
        raise UsageError(f"{name} {text}: nothing is left to use ({format_bytes(count)}); give more than 0")
    return count


def check_amount(text: str, *, name: str) -> None:
    """Raise UsageError if the text is no amount of any memory: `12GiB`, `-1GiB`, `85%`."""
    stripped = text.strip()
    if stripped.endswith("%"):
        _percentage(stripped)
    else:
        parse_bytes(stripped.removeprefix("-"), name=name)


def _percentage(text: str) -> float:
    try:
        share = float(text[:-1])
    except ValueError:
        raise UsageError(f"{text!r} is not a percentage") from None
    if not 0 <= share <= 100:
        raise UsageError(f"{text!r} is not between 0% and 100%")
    return share


def _known(count: int | None, text: str, name: str) -> int:
    if count is None:
        raise UsageError(f"{name} {text}: this machine has no such memory to take it from; give an absolute size")
    return count


def format_seconds(count: float) -> str:
    """Seconds for a person: `6.6 ms`, `0.84 s`, `69 s`, `2.5 min`."""
    if count < 0.01:
        return f"{count * 1000:.2g} ms"
    return f"{count / 60:.1f} min" if count >= 120 else f"{count:.2g} s" if count < 10 else f"{count:.0f} s"


def format_seconds_range(count: float, between: Sequence[float] | None) -> str:
    """The range that seconds are in, for a person: `60 to 85 s`, `0.84 to 1.3 s`; the seconds themselves without one.

    Two significant digits: no range is known better.
    """
    if between is None:
        return format_seconds(count)
    low, high = (format_seconds(float(f"{value:.2g}")) for value in between)
    number, _, unit = low.partition(" ")
    return f"{number} to {high}" if high.endswith(f" {unit}") else f"{low} to {high}"
