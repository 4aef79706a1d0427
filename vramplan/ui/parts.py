"""Parts of the page: the fields of the selection, and a plan as HTML."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from dash import dcc, html

from vramplan.ui.choices import AMOUNTS, COUNTS, LOCAL, Choices
from vramplan.ui.work import Answer, Details
from vramplan.units import format_bytes

_LABELS = {
    "width": "Width", "height": "Height", "frames": "Frames", "batch": "Batch", "steps": "Steps",
    "vram": "VRAM, GiB", "ram": "RAM, GiB",
}  # fmt: skip
_FIELDS = {
    "width": "width", "height": "height", "frames": "num_frames", "batch": "num_images_per_prompt",
    "steps": "num_inference_steps",
}  # fmt: skip
_QUALITIES = {
    "": "lossless where it fits",
    "lossless": "lossless only",
    "near_lossless": "near lossless",
    "lossy": "lossy",
}
_HEADER = ("", "VRAM", "RAM", "a call", "settings", "reason")
_WORKING_TEXT = "Working it out: the pipeline is run on a simulated card. The first time takes longest."


def page_layout(choices: Choices) -> Any:
    """The whole page, with this machine selected if it has an accelerator, and nothing else."""
    hints = {"vram": "all", "ram": choices.ram}
    numbers = [_number(name, "usual", 1) for name in COUNTS]
    numbers += [_number(name, hints[name], "any") for name in AMOUNTS]
    stores = [dcc.Store(id=name) for name in ("candidates-plain", "memory-plain", "planned", "screen")]
    return html.Main(
        [
            dcc.Store(id="page", data=uuid4().hex),
            *stores,
            html.H1("vramplan"),
            html.Div(
                [
                    _list("model", "Model", choices.models, None, "choose a model"),
                    _list("device", "Card", choices.devices, LOCAL if choices.accelerated else None, "choose a card"),
                    *numbers,
                    _list("allow", "Allowed", _QUALITIES, "", ""),
                ],
                id="wish",
            ),
            html.P(_WORKING_TEXT, id="busy", role="status", hidden=True),
            html.Div(
                [
                    html.Div(id="answer"),
                    html.P("Looking further ...", id="drawing", role="status", hidden=True),
                    html.Div(id="helps"),
                    _figure("memory", "Memory over the call", html.P(id="words")),
                    _figure("candidates", "Every candidate: time against peak"),
                ],
                id="found",
            ),
        ]
    )


def _list(name: str, text: str, choices: Any, value: str | None, hint: str) -> Any:
    options = [{"value": key, "label": label, "search": f"{label} {key}"} for key, label in choices.items()]
    field = dcc.Dropdown(
        options, value, id=name, placeholder=hint, clearable=False, searchable=name != "allow", maxHeight=360
    )
    return html.Div([html.Label(text, htmlFor=name), field], className=f"field {name}")


def _number(name: str, hint: str, step: int | str) -> Any:
    field = dcc.Input(id=name, type="number", min=0 if step == "any" else 1, step=step, debounce=True, placeholder=hint)
    return html.Div([html.Label(_LABELS[name], htmlFor=name), field], className="field number")


def _figure(name: str, title: str, *more: Any) -> Any:
    graph = dcc.Graph(id=name, responsive=True, config={"displayModeBar": False})  # as high as its container
    return html.Section([html.H2(title), *more, html.Div(graph, className="graph")], id=f"{name}-part", hidden=True)


def answer_view(found: Answer) -> Any:
    """The plan, or the error in one line."""
    if found.error:
        return html.P(found.error, role="alert", className="short" if found.short else "wrong")
    rows = [cell for name, text in found.rows for cell in (html.Dt(name), html.Dd(text, id=f"row-{name}"))]
    return [
        html.Dl(rows),
        *_bar(found),
        *(html.P(f"note: {note}", className="note") for note in found.notes),
        html.Details([html.Summary(f"{len(found.reasons)} candidates, and why not each"), _table(found)]),
        html.Details(
            [
                html.Summary("The plan as plain diffusers calls"),
                dcc.Clipboard(content=found.code, title="copy", className="copy"),
                html.Pre(found.code, id="code", tabIndex="0"),
            ]
        ),
    ]


def _bar(found: Answer) -> list[Any]:
    """The bar of the memory at the peak, with its legend."""
    if not found.bar:
        return []
    segments = [html.I(style={"flexGrow": size, "background": colour}) for _, size, colour in found.bar]
    legend = [
        html.Li([html.I(style={"background": colour}), f"{name} {format_bytes(size)}"])
        for name, size, colour in found.bar
    ]
    return [html.Div(segments, className="bar"), html.Ul(legend, className="legend")]


def _table(found: Answer) -> Any:
    head = html.Thead(html.Tr([html.Th(name) for name in _HEADER]))
    body = [html.Tr([html.Td(cell) for cell in row], className=row[0]) for row in found.reasons]
    return html.Div(html.Table([head, html.Tbody(body)]), className="wide", tabIndex="0")


def suggestions_view(found: Details) -> Any:
    """The list of changes that would make it fit."""
    if not found.suggestions:
        return []
    items = [html.Li(text) for text in found.suggestions]
    return [html.P("By its price it fits with any one of these:"), html.Ul(items)]


def default_numbers(found: Answer) -> list[str]:
    """The default of each count."""
    if found.workload is None:
        return ["usual"] * len(COUNTS)
    return [f"{getattr(found.workload, _FIELDS[name])}" for name in COUNTS]
