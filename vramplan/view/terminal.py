"""Views made of rich's renderables, and their output on a terminal, through a pipe and in a notebook."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from vramplan.units import format_bytes

_LEAST, _MOST = 60, 140
# Lines through a pipe are not wrapped, so that a program can find each.
_PIPE_WIDTH = 100_000
_NOTEBOOK_WIDTH = 110
_BAR_WIDTH = 72
_ASCII_HEAD = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


class _AsciiBuffer(StringIO):
    """A text buffer on which rich uses ASCII only."""

    encoding = "ascii"


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment of a bar: its name, bytes, two characters (the second in ASCII) and style."""

    name: str
    size_bytes: int
    marks: str
    style: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A memory as a bar of parts, with a legend. Empty parts are left out."""

    name: str
    parts: Sequence[Segment]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = [part for part in self.parts if part.size_bytes > 0]
        total = sum(part.size_bytes for part in parts)
        if not total:
            return
        mark = 1 if options.ascii_only else 0
        room = min(options.max_width - len(self.name) - 4, _BAR_WIDTH if options.max_width == _PIPE_WIDTH else _MOST)
        line = Text(f"{self.name} [")
        for part, width in zip(parts, _shares([part.size_bytes for part in parts], room), strict=True):
            line.append(part.marks[mark] * width, part.style)
        yield line + Text("]")
        items = [_legend(part, mark) for part in parts]
        yield Columns([*items, Text(f"= {format_bytes(total)}")], padding=(0, 2))


def _legend(part: Segment, mark: int) -> Text:
    return Text.assemble((part.marks[mark], part.style), f" {part.name} {format_bytes(part.size_bytes)}", end="")


def _shares(sizes: Sequence[int], room: int) -> list[int]:
    """Divide `room` columns in proportion to the sizes, with at least one column for each."""
    widths = [max(1, round(size * room / sum(sizes))) for size in sizes]
    widths[widths.index(max(widths))] += room - sum(widths)
    return widths


def hang(line: str, at: int, style: str = "bold") -> RenderableType:
    """A line with a hanging indent after its first `at` characters, a name in the given style."""
    grid = Table.grid(padding=0)
    grid.add_column(no_wrap=True, min_width=at)
    grid.add_column(overflow="fold")
    grid.add_row(Text(line[:at], style), Text(line[at:]))
    return grid


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[str]) -> RenderableType:
    """A plain table; long text wraps, but not in the `numeric` columns."""
    return _Table(tuple(header), tuple(map(tuple, rows)), tuple(numeric))


@dataclass(frozen=True, slots=True)
class _Table:
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[str, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        made = Table(
            box=_ASCII_HEAD if options.ascii_only else box.SIMPLE_HEAD, pad_edge=False, show_edge=False,
            header_style="bold",
        )  # fmt: skip
        for name in self.header:
            numeric = name in self.numeric
            made.add_column(Text(name), justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
        for row in self.rows:
            made.add_row(*map(Text, row))
        yield made


def stack(views: Sequence[RenderableType]) -> RenderableType:
    """Stack views vertically."""
    return Group(*views)


def as_text(view: RenderableType) -> str:
    """The view in ASCII without colours: as wide as the terminal, or `COLUMNS`; not wrapped through a pipe."""
    out = _AsciiBuffer()
    _console(out, _width(sys.stdout), color_system=None).print(view)
    return "\n".join(_lines(out.getvalue()))


def as_html(view: RenderableType) -> str:
    """The view for a notebook, in a block of fixed width."""
    console = _console(StringIO(), _NOTEBOOK_WIDTH, record=True, force_jupyter=False)
    console.print(view)
    return console.export_html(inline_styles=True, code_format='<pre style="line-height: 1.2">{code}</pre>')


def show(view: RenderableType) -> None:
    """Print the view: with colours on a terminal that has them, unless `NO_COLOR` is set; else like `as_text`."""
    if not sys.stdout.isatty():
        print(as_text(view), flush=True)
        return
    _console(sys.stdout, _width(sys.stdout)).print(view)


def _console(file: Any, width: int, **options: Any) -> Console:
    return Console(file=file, width=width, markup=False, highlight=False, emoji=False, **options)


def _lines(text: str) -> Iterator[str]:
    return (line.rstrip() for line in text.rstrip("\n").split("\n"))


def _width(file: Any) -> int:
    if not os.environ.get("COLUMNS") and not file.isatty():
        return _PIPE_WIDTH
    return max(_LEAST, min(_MOST, shutil.get_terminal_size((100, 24)).columns))
