"""Draw pictures as one HTML file that works offline, at any width, and in dark mode."""

from __future__ import annotations

from html import escape
from pathlib import Path
from textwrap import wrap
from typing import Any

from vramplan.view.plot.candidates import CandidatesPicture, Dots
from vramplan.view.plot.colours import CHOSEN, LIMIT, NEUTRAL
from vramplan.view.plot.memory import Layer, MemoryPicture

_SYMBOLS = {"o": "circle", "x": "x-thin-open", "+": "cross-thin-open", "*": "star", "D": "diamond"}
_SIZES = {"o": 9, "x": 9, "+": 10, "*": 18, "D": 11}
_GRID = "rgba(128,128,128,0.25)"
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0; padding: 0.6rem; background: #fff; color: #1a1a1a; font-family: sans-serif; }}
h1 {{ font-size: 1.05rem; margin: 0.3rem; overflow-wrap: anywhere; }}
p {{ font-size: 0.85rem; margin: 0.3rem; overflow-wrap: anywhere; }}
#picture {{ width: 100% !important; height: calc(100vh - 5.5rem) !important; min-height: 26rem; }}
@media (max-width: 50rem) {{ #picture {{ min-height: 42rem; }} }}
@media (prefers-color-scheme: dark) {{ body {{ background: #15181c; color: #e6e6e6; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{below}</p>
{figure}
</body>
</html>
"""
_CONFIG = {"responsive": True, "displayModeBar": False}
_RESTYLE = """
const picture = document.getElementById('{plot_id}');
const dressed = () => { const now = dress(picture); Plotly.react(picture, now.data, now.layout); };
onScreenChange(dressed);
dressed();
"""


def dress_script() -> str:
    """The JavaScript functions `dress(figure)`, which sets a figure's colours and legend by the colours and the width
    of its page, and `onScreenChange(call)`, which calls when either changes."""
    return (Path(__file__).parent / "dress.js").read_text(encoding="utf-8")


def memory_page(picture: MemoryPicture) -> str:
    """The page with VRAM over RAM on one axis."""
    return _page(memory_figure(picture), picture.title, memory_words(picture))


def memory_words(picture: MemoryPicture) -> str:
    """The caption: the module at the peak, and how to read the figure."""
    stop = " It stops where memory runs out." if picture.stopped else ""
    below = "From left to right the call, in the order of its allocations; phases are not to scale."
    return f"{picture.peak_name}. {below}{stop}"


def memory_figure(picture: MemoryPicture) -> Any:
    """VRAM over RAM on one axis, without the page's colours."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=(0.75, 0.25), vertical_spacing=0.05)
    for row, layers in ((1, picture.device), (2, picture.host)):
        for layer in layers:
            figure.add_scatter(**_area(layer, picture, f"memory {row}"), row=row, col=1)
    figure.add_scatter(
        x=picture.places, y=picture.reserved, name="reserved by torch", mode="lines", meta="text",
        line={"shape": "hv", "width": 1}, hovertemplate="%{y:.2f} GiB", row=1, col=1,
    )  # fmt: skip
    if picture.budget is not None:
        _budget_line(figure, picture.budget, "right" if picture.peak_at < 0.5 else "left", row=1, col=1)
    for span in picture.phases:
        if span.start:
            figure.add_vline(x=span.start, line={"color": NEUTRAL, "width": 1, "dash": "dot"})
        figure.add_annotation(
            x=(span.start + span.end) / 2, y=1, yref="paper", yanchor="bottom", text=span.name, showarrow=False
        )
    for row, levels in ((1, picture.measured_device), (2, picture.measured_host)):
        for level, dash in zip(levels, ("dashdot", "dot"), strict=False):
            figure.add_scatter(
                x=level.places, y=level.sizes, name=level.name, mode="lines", meta="text",
                line={"width": 1.5, "dash": dash}, hoverinfo="skip", row=row, col=1,
            )  # fmt: skip
    figure.update_layout(hovermode="x unified")
    figure.update_xaxes(showticklabels=False, range=(0, 1), showgrid=False, zeroline=False, hoverformat=".0%")
    top = max([*picture.reserved, picture.budget or 0, *(level.highest for level in picture.measured_device)]) * 1.3
    _peak(figure, picture, top)
    figure.update_yaxes(title="VRAM, GiB", range=(0, top), row=1, col=1)
    figure.update_yaxes(title="RAM, GiB", rangemode="tozero", row=2, col=1)
    return _style(figure)


def _peak(figure: Any, picture: MemoryPicture, top: float) -> None:
    """Label the peak above the stack, on its side with more room, in lines that fit on a phone: module names are broken
    at their dots."""
    right = picture.peak_at < 0.5
    words = wrap(picture.peak_name.replace(".", ". "), 30, break_on_hyphens=False)
    figure.add_annotation(
        x=picture.peak_at, y=picture.peak, ax=picture.peak_at, ay=top * 0.98, axref="x", ayref="y",
        text="<br>".join(escape(line.replace(". ", ".")) for line in words), align="left" if right else "right",
        xanchor="left" if right else "right", yanchor="top", arrowcolor=NEUTRAL, arrowwidth=1.5, row=1, col=1,
    )  # fmt: skip


def _area(layer: Layer, picture: MemoryPicture, stack: str) -> dict[str, Any]:
    return {
        "x": picture.places,
        "y": layer.sizes,
        "name": layer.name,
        "stackgroup": stack,
        "mode": "lines",
        "line": {"shape": "hv", "width": 0},
        "fillcolor": layer.colour,
        "text": picture.running,
        "hovertemplate": "%{y:.2f} GiB" + (" in %{text}" if layer.name == "activations" else ""),
    }


def candidates_page(picture: CandidatesPicture) -> str:
    """The page with time against peak memory, the region that fits shaded."""
    chosen = next((group.settings[0] for group in picture.groups if group.name == "chosen"), None)
    region = f"In the green region {picture.memory} is enough."
    return _page(candidates_figure(picture), picture.title, f"Chosen: {chosen}. {region}" if chosen else region)


def candidates_figure(picture: CandidatesPicture) -> Any:
    """Time against peak memory, the region that fits shaded, without the page's colours."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_hrect(y0=0, y1=picture.budget, fillcolor=CHOSEN, opacity=0.1, line_width=0, layer="below")
    _budget_line(figure, picture.budget, "right")
    for group in picture.groups:
        figure.add_scatter(
            x=group.times, y=group.sizes, mode="markers", name=f"{group.name} ({len(group.times)})",
            marker={
                "symbol": _SYMBOLS[group.symbol], "size": _SIZES[group.symbol], "color": group.colour,
                "line": {"width": 2 if group.symbol in "x+" else 1, "color": group.colour},
            },
            text=_hovers(group),
            hovertemplate=f"%{{y:.2f}} GiB, %{{x:.3g}} {picture.unit} a call<br>%{{text}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title=f"{picture.unit} a call, projected", type="log" if picture.logarithmic else "linear")
    figure.update_yaxes(title=f"{picture.memory} at the peak, GiB, projected", rangemode="tozero")
    return _style(figure)


def _hovers(group: Dots) -> list[str]:
    """Settings and reason of each candidate, in lines that fit on a phone."""
    return [
        "<br>".join(escape(line) for text in pair for line in wrap(text, 46))
        for pair in zip(group.settings, group.reasons, strict=True)
    ]


def _budget_line(figure: Any, budget: float, side: str, **place: int) -> None:
    line = {"color": LIMIT, "dash": "dash", "width": 1.5}
    note = {"text": f"budget {budget:.2f} GiB", "font": {"color": LIMIT}}
    figure.add_hline(y=budget, line=line, annotation=note, annotation_position=f"top {side}", **place)


def _style(figure: Any) -> Any:
    figure.update_xaxes(gridcolor=_GRID, linecolor=NEUTRAL)
    figure.update_yaxes(gridcolor=_GRID, linecolor=NEUTRAL, zerolinecolor=NEUTRAL)
    figure.update_layout(
        template="none",
        autosize=True,
        margin={"l": 55, "r": 10, "t": 30, "b": 45},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"traceorder": "reversed"},
    )
    return figure


def _page(figure: Any, title: str, below: str) -> str:
    made = figure.to_html(
        full_html=False, include_plotlyjs=True, div_id="picture", default_width="100%", default_height="100%",
        config=_CONFIG, post_script=dress_script() + _RESTYLE,
    )  # fmt: skip
    return _PAGE.format(title=escape(title), below=escape(below), figure=made)
