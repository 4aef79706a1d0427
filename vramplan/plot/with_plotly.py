"""Pictures as one HTML file that needs no network, for any width and for dark screens."""

from __future__ import annotations

from html import escape
from textwrap import wrap
from typing import Any

from vramplan.plot.candidates import CandidatesPicture, Dots
from vramplan.plot.colours import CHOSEN, LIMIT, NEUTRAL
from vramplan.plot.memory import Layer, MemoryPicture

_SYMBOLS = {"o": "circle", "x": "x-thin-open", "+": "cross-thin-open", "*": "star"}
_SIZES = {"o": 9, "x": 9, "+": 10, "*": 18}
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
# The page's own colour for every text and line of the figure, now and when the screen changes. Beside a narrow figure
# there is no room for a legend, and a finger that drags there is to scroll.
_FOLLOW = """
const picture = document.getElementById('{plot_id}');
const dark = window.matchMedia('(prefers-color-scheme: dark)');
const narrow = window.matchMedia('(max-width: 50rem)');
function follow() {
  const style = getComputedStyle(document.body);
  const text = style.color, ground = style.backgroundColor;
  Plotly.relayout(picture, {
    'font.color': text, 'hoverlabel.bgcolor': ground, 'hoverlabel.font.color': text,
    'legend.x': narrow.matches ? 0 : 1.02, 'legend.y': narrow.matches ? -0.16 : 1, 'legend.yanchor': 'top',
    'dragmode': narrow.matches ? false : 'zoom',
  });
  const lines = picture.data.map((trace, place) => trace.meta === 'text' ? place : -1).filter(place => place >= 0);
  if (lines.length) Plotly.restyle(picture, {'line.color': text}, lines);
}
dark.addEventListener('change', follow);
narrow.addEventListener('change', follow);
follow();
"""


def memory_page(picture: MemoryPicture) -> str:
    """The page with VRAM over RAM on one axis."""
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
        _budget_line(figure, picture.budget, row=1, col=1)
    for span in picture.phases:
        if span.start:
            figure.add_vline(x=span.start, line={"color": NEUTRAL, "width": 1, "dash": "dot"})
        figure.add_annotation(
            x=(span.start + span.end) / 2, y=1, yref="paper", yanchor="bottom", text=span.name, showarrow=False
        )
    figure.add_annotation(x=picture.peak_at, y=picture.peak, text="peak", ax=0, ay=-24, row=1, col=1)
    figure.update_layout(hovermode="x unified")
    figure.update_xaxes(showticklabels=False, range=(0, 1), showgrid=False, zeroline=False, hoverformat=".0%")
    top = max([*picture.reserved, picture.budget or 0]) * 1.12
    figure.update_yaxes(title="VRAM, GiB", range=(0, top), row=1, col=1)
    figure.update_yaxes(title="RAM, GiB", rangemode="tozero", row=2, col=1)
    stop = " It stops where memory runs out." if picture.stopped else ""
    below = "From left to right the call, in the order of its allocations; phases are not to scale."
    return _page(figure, picture.title, f"{picture.peak_name}. {below}{stop}")


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
    """The page with time against peak, the region that fits shaded."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_hrect(y0=0, y1=picture.budget, fillcolor=CHOSEN, opacity=0.1, line_width=0, layer="below")
    _budget_line(figure, picture.budget)
    for group in picture.groups:
        figure.add_scatter(
            x=group.seconds, y=group.sizes, mode="markers", name=f"{group.name} ({len(group.seconds)})",
            marker={
                "symbol": _SYMBOLS[group.symbol], "size": _SIZES[group.symbol], "color": group.colour,
                "line": {"width": 2 if group.symbol in "x+" else 1, "color": group.colour},
            },
            text=_hovers(group), hovertemplate="%{y:.2f} GiB, %{x:.3g} s a call<br>%{text}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title="seconds a call, projected", type="log" if picture.logarithmic else "linear")
    figure.update_yaxes(title=f"{picture.memory} at the peak, GiB, projected", rangemode="tozero")
    chosen = next((group.settings[0] for group in picture.groups if group.name == "chosen"), None)
    return _page(figure, picture.title, f"Chosen: {chosen}" if chosen else "")


def _hovers(group: Dots) -> list[str]:
    """Settings and reason, in lines that a phone is wide enough for."""
    return [
        "<br>".join(escape(line) for text in pair for line in wrap(text, 46))
        for pair in zip(group.settings, group.reasons, strict=True)
    ]


def _budget_line(figure: Any, budget: float, **place: int) -> None:
    line = {"color": LIMIT, "dash": "dash", "width": 1.5}
    note = {"text": f"budget {budget:.2f} GiB", "font": {"color": LIMIT}}
    figure.add_hline(y=budget, line=line, annotation=note, annotation_position="top left", **place)


def _page(figure: Any, title: str, below: str) -> str:
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
    made = figure.to_html(
        full_html=False, include_plotlyjs=True, div_id="picture", default_width="100%", default_height="100%",
        config={"responsive": True, "displayModeBar": False}, post_script=_FOLLOW,
    )  # fmt: skip
    return _PAGE.format(title=escape(title), below=escape(below), figure=made)
