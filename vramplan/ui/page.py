"""The page as an application: its layout and its callbacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dash import Dash, Input, Output, State
from dash.exceptions import PreventUpdate

from vramplan.errors import VramplanError
from vramplan.ui.choices import AMOUNTS, COUNTS, Selection, check_selection, find_choices
from vramplan.ui.parts import answer_view, default_numbers, page_layout, suggestions_view
from vramplan.ui.work import Answer, Details, answer, details
from vramplan.view.plot.plotly_figures import dress_script

_INDEX = """<!DOCTYPE html>
<html lang="en">
<head>
{%metas%}
<meta name="color-scheme" content="light dark">
<title>{%title%}</title>
{%css%}
<style>STYLE</style>
</head>
<body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body>
</html>
"""


class Ask(Protocol):
    """Have the worker call a function with a selection; None if the same page has asked again since."""

    def __call__(self, page: str, call: Callable[[Selection], Any], selection: Selection, /) -> Any:
        """Return the result of `call`. Raises VramplanError if the worker ended."""


def make_page(folder: Path | None, ask: Ask) -> Dash:
    """Make the page, a WSGI application (`.server`) that offers the profiles and the folder's pipelines."""
    app = Dash(__name__, title="vramplan", update_title="", include_assets_files=False)
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    app.index_string = _INDEX.replace("STYLE", style)
    latest = [find_choices(folder)]

    def layout() -> Any:
        latest[0] = find_choices(folder)
        return page_layout(latest[0])

    def run(page: str, call: Callable[[Selection], Any], values: Mapping[str, Any], fail: Callable[[str], Any]) -> Any:
        try:
            result = ask(page, call, check_selection(latest[0], **values))
        except VramplanError as error:
            return fail(str(error))
        if result is None:
            raise PreventUpdate
        return result

    app.layout = layout
    _dress_figures(app)

    @app.callback([Output(name, "value") for name in COUNTS], Input("model", "value"), prevent_initial_call=True)
    def forget(_: str) -> list[None]:
        """Clear the counts, as another model has other defaults."""
        return [None] * len(COUNTS)

    @app.callback(
        output=[
            Output("answer", "children"), Output("candidates-plain", "data"), Output("planned", "data"),
            [Output(name, "placeholder") for name in COUNTS], Output("frames", "disabled"),
        ],
        inputs={name: Input(name, "value") for name in ("model", "device", "allow", *COUNTS, *AMOUNTS)},
        state={"page": State("page", "data")},
        running=[(Output("busy", "hidden"), False, True), (Output("found", "className"), "stale", "")],
    )  # fmt: skip
    def plan(page: str, allow: str, **chosen: Any) -> Any:
        """Plan for the selection."""
        if not chosen["model"] or not chosen["device"]:
            raise PreventUpdate
        values = {"allow": allow or None, **chosen}
        found = run(page, answer, values, lambda text: Answer(error=text))
        picture = json.loads(found.picture) if found.picture else None
        hopeless = found.error and not found.short
        return answer_view(found), picture, None if hopeless else values, default_numbers(found), not found.video

    @app.callback(
        Output("memory-plain", "data"), Output("words", "children"), Output("helps", "children"),
        Input("planned", "data"), State("page", "data"),
        running=[(Output("drawing", "hidden"), False, True)],
    )  # fmt: skip
    def draw(values: dict[str, Any] | None, page: str) -> Any:
        """The picture of the plan, or the changes that would make one fit."""
        if not values:
            return None, "", []
        found = run(page, details, values, lambda text: Details(words=text))
        return json.loads(found.picture) if found.picture else None, found.words, suggestions_view(found)

    return app


def _dress_figures(app: Dash) -> None:
    """Give figures the page's colours in the browser, and again when the screen changes."""
    wait = "window.dash_clientside.no_update"
    for name in ("memory", "candidates"):
        app.clientside_callback(
            f"function(plain, _) {{ {dress_script()} return plain ? [dress(plain), false] : [{wait}, true]; }}",
            Output(name, "figure"), Output(f"{name}-part", "hidden"),
            Input(f"{name}-plain", "data"), Input("screen", "data"),
        )  # fmt: skip
    changed = "() => window.dash_clientside.set_props('screen', {data: Date.now()})"
    app.clientside_callback(
        f"function(_) {{ {dress_script()} onScreenChange({changed}); return 0; }}",
        Output("screen", "data"),
        Input("page", "data"),
    )
