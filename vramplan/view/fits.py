"""Answers of `fit`, as tables for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vramplan.fitting.types import Fits, Largest, Row, Smallest
from vramplan.planfile.types import settings_text
from vramplan.units import GIB, format_bytes, format_seconds_range
from vramplan.view.shared import table_view
from vramplan.workload import workload_text

if TYPE_CHECKING:
    from rich.console import RenderableType

_MOST_NAMES = 2  # cards named for each memory size


def fits_dict(fits: Fits) -> dict[str, Any]:
    """The answer as an object for programs."""
    return asdict(fits)


def text_of(fits: Fits) -> str:
    """The answer for a person, as plain text."""
    from vramplan.view.terminal import as_text

    return as_text(fits_view(fits))


def html_of(fits: Fits) -> str:
    """The answer for a notebook."""
    from vramplan.view.terminal import as_html

    return as_html(fits_view(fits))


def fits_view(fits: Fits) -> RenderableType:
    """The answer for a person: the smallest cards, the models, or the largest workloads, each with its plan."""
    from vramplan.view.terminal import stack

    return stack(list({"cards": _cards, "models": _models, "largest": _largest}[fits.question](fits)))


def _cards(fits: Fits) -> Iterator[RenderableType]:
    """Tables for each model: the smallest card for each quality, then the memory sizes of cards."""
    for model in dict.fromkeys(row.model for row in fits.rows):
        rows = [row for row in fits.rows if row.model == model]
        answers = [item for item in fits.smallest if item.model == model]
        yield f"{model}: {workload_text(rows[0].workload)}"
        yield ""
        yield table_view(("allowed", "smallest card", "memory", "least VRAM", "chosen there"), map(_answer, answers))
        yield ""
        yield table_view(("memory", "card", "VRAM", "a call", "quality", "chosen"), _sizes(rows))
        yield ""
    yield (
        "The smallest cards are simulated within their memory. The sizes are priced, each for its least card, up to "
        "the first of each kind that holds everything: larger ones differ in speed only."
    )


def _answer(item: Smallest) -> Sequence[str]:
    words = item.allow.replace("_", " ")
    row = item.row
    if row is None or row.device is None or item.least_vram_bytes is None:
        return words, "none", "", "", ""
    return words, row.device, _memory_text(row), format_bytes(item.least_vram_bytes), _chosen(row)


def _sizes(rows: Sequence[Row]) -> Iterable[Sequence[str]]:
    none = [row for row in rows if not row.fits]
    if none:
        yield f"{len(none)} size{'s' if len(none) > 1 else ''}", _names(none), "", "", "", "does not fit"
    for row in rows:
        if row.fits:
            yield _memory_text(row), _names([row]), *_price(row), _chosen(row)


def _names(rows: Sequence[Row]) -> str:
    names = [name for row in rows for name in (row.device or "", *row.alike)]
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _memory_text(row: Row) -> str:
    return "" if row.memory_bytes is None else f"{row.memory_bytes / GIB:.0f} GiB"


def _price(row: Row) -> tuple[str, str, str]:
    if row.projected is None or row.quality is None:
        return "", "", ""
    price = row.projected
    return (
        format_bytes(price.vram_reserved_bytes),
        format_seconds_range(price.seconds_per_call, price.seconds_per_call_range),
        row.quality.replace("_", " "),
    )


def _chosen(row: Row) -> str:
    return row.reason if row.settings is None else settings_text(row.settings)


def _models(fits: Fits) -> Iterator[RenderableType]:
    rows = [(row.model, workload_text(row.workload), *_price(row), _chosen(row)) for row in fits.rows]
    yield _machine_line(fits)
    yield ""
    yield table_view(("model", "for", "VRAM", "a call", "quality", "chosen"), rows)


def _machine_line(fits: Fits) -> str:
    row = fits.rows[0]
    memory = "" if row.memory_bytes is None else f", {format_bytes(row.memory_bytes)}"
    return f"on {row.device or 'the CPU'}{memory}"


def _largest(fits: Fits) -> Iterator[RenderableType]:
    from vramplan.view.terminal import hang

    yield _machine_line(fits)
    for row, beyond in zip(fits.rows, fits.largest, strict=True):
        first, *more = _largest_lines(row, beyond)
        yield ""
        yield first
        yield from (hang(line, 10) for line in more)


def _largest_lines(row: Row, beyond: Largest) -> Iterable[str]:
    if not row.fits:
        yield f"{row.model}: not even {workload_text(row.workload)} fits: {row.reason}"
        return
    vram, seconds, quality = _price(row)
    yield f"{row.model}: the largest {beyond.dimension} is {workload_text(row.workload)}"
    yield f"  chosen  {_chosen(row)}"
    yield f"  takes   {vram} of VRAM, {seconds} a call; {quality}"
    if beyond.next is None:
        yield "  beyond  nothing larger was looked for"
    else:
        yield f"  beyond  {workload_text(beyond.next.workload)}: {beyond.next.reason}"
