"""Draw pictures as SVG or PNG, without a window and without matplotlib's global state."""

from __future__ import annotations

from io import BytesIO
from math import nan
from textwrap import fill
from typing import Any

from vramplan.view.plot.candidates import CandidatesPicture
from vramplan.view.plot.colours import CHOSEN, LIMIT, NEUTRAL
from vramplan.view.plot.memory import MemoryPicture

_SYMBOL_AREAS = {"o": 40, "x": 34, "+": 50, "*": 240, "D": 70}


def draw_memory(picture: MemoryPicture) -> Any:
    """A figure of VRAM over RAM on one axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.6), layout="constrained")
    vram, ram = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for axes, layers in ((vram, picture.device), (ram, picture.host)):
        axes.stackplot(
            picture.places,
            *(layer.sizes for layer in layers),
            labels=[layer.name for layer in layers],
            colors=[layer.colour for layer in layers],
            step="post",
            linewidth=0,
        )
    _lines(vram, picture)
    for axes, levels in ((vram, picture.measured_device), (ram, picture.measured_host)):
        for level, dashes in zip(levels, ("-.", (0, (1, 1))), strict=False):
            places, sizes = ([nan if one is None else one for one in ends] for ends in (level.places, level.sizes))
            axes.plot(places, sizes, color="black", linestyle=dashes, linewidth=1.6, label=level.name)
    _phases(vram, ram, picture)
    _peak(vram, picture)
    if picture.stopped:
        vram.annotate(
            "out of memory", (picture.places[-1], 0.45), xycoords=("data", "axes fraction"), xytext=(5, 0),
            textcoords="offset points", color=LIMIT, weight="bold",
        )  # fmt: skip
    vram.set_ylabel("VRAM, GiB")
    ram.set_ylabel("RAM, GiB")
    ram.set_xlabel("the call, in the order of its allocations; phases are not to scale")
    ram.set_xticks([])
    ram.set_xlim(0, 1)
    figure.suptitle(picture.title, fontsize=12)
    for axes in (vram, ram):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=NEUTRAL, alpha=0.25)
        handles, names = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], names[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    return figure


def _lines(axes: Any, picture: MemoryPicture) -> None:
    axes.plot(
        picture.places, picture.reserved, drawstyle="steps-post", color="black", linewidth=1, label="reserved by torch"
    )
    top = max([*picture.reserved, picture.budget or 0, *(level.highest for level in picture.measured_device)])
    if picture.budget is not None:
        axes.axhline(picture.budget, color=LIMIT, linestyle="--", label=f"budget: {picture.budget:.2f} GiB")
    axes.set_ylim(0, top * 1.25)  # room for the label of the peak


def _phases(vram: Any, ram: Any, picture: MemoryPicture) -> None:
    for span in picture.phases:
        for axes in (vram, ram):
            if span.start > 0:
                axes.axvline(span.start, color=NEUTRAL, linewidth=0.8, linestyle=":")
        vram.annotate(
            span.name, ((span.start + span.end) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", ha="center", va="bottom", fontsize=10,
        )  # fmt: skip


def _peak(axes: Any, picture: MemoryPicture) -> None:
    """Label the peak, on its side with more room, between the stack and the top."""
    right = picture.peak_at < 0.5
    axes.annotate(
        fill(picture.peak_name, 60, break_on_hyphens=False),
        (picture.peak_at, picture.peak),
        xytext=(picture.peak_at + (0.02 if right else -0.02), axes.get_ylim()[1] * 0.93),
        ha="left" if right else "right", va="center", fontsize=9,
        arrowprops={"arrowstyle": "->", "color": "black", "relpos": (0 if right else 1, 0)},
        bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": NEUTRAL},
    )  # fmt: skip


def draw_candidates(picture: CandidatesPicture) -> Any:
    """A figure of time against peak memory, with the region that fits shaded and the chosen candidate named."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes: Any = figure.subplots()
    axes.axhspan(0, picture.budget, color=CHOSEN, alpha=0.08, linewidth=0, label=f"{picture.memory} is enough")
    axes.axhline(picture.budget, color=LIMIT, linestyle="--", label=f"budget: {picture.budget:.2f} GiB")
    for group in picture.groups:
        axes.scatter(
            group.times, group.sizes, c=group.colour, marker=group.symbol, s=_SYMBOL_AREAS[group.symbol],
            label=f"{group.name} ({len(group.times)})", zorder=3,
            **({} if group.symbol in "x+" else {"edgecolors": "black", "linewidths": 0.6}),
        )  # fmt: skip
    if picture.logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0)
    axes.set_xlabel(f"{picture.unit} a call, projected")
    axes.set_ylabel(f"{picture.memory} at the peak, GiB, projected")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=NEUTRAL, alpha=0.25)
    named = next((group for group in picture.groups if group.name == "chosen"), None)
    title = picture.title if named is None else f"{picture.title}\n{fill('chosen: ' + named.settings[0], 110)}"
    figure.suptitle(title, fontsize=11)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def to_bytes(figure: Any, form: str) -> bytes:
    """The file's content: `svg` or `png`. The same figure gives the same bytes."""
    import matplotlib as mpl

    out = BytesIO()
    with mpl.rc_context({"svg.hashsalt": "vramplan", "svg.fonttype": "none"}):
        figure.savefig(out, format=form, dpi=120, metadata={"Date": None} if form == "svg" else {"Software": None})
    return out.getvalue()
