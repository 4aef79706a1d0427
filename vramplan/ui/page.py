"""The page: what stands on it, and what happens when something on it changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dash import Dash, Input, Output, State
from dash.exceptions import PreventUpdate

from vramplan.errors import VramplanError
from vramplan.ui.choices import AMOUNTS, COUNTS, Wish, find_choices, make_wish
from vramplan.ui.parts import answer_view, helps_view, page_layout, usual_numbers
from vramplan.ui.work import Answer, Further, answer, further
from vramplan.view.plot.with_plotly import dress_script

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
    """Has the worker call something with a wish; None where the same page has asked again since."""

    def __call__(self, page: str, call: Callable[[Wish], Any], wish: Wish, /) -> Any:
        """What the call returned. Raises VramplanError where the worker ended."""


def make_page(folder: Path | None, ask: Ask) -> Dash:
    """The page as a WSGI application (`.server`); the pipelines of the folder can be chosen beside the profiles."""
    app = Dash(__name__, title="vramplan", update_title="", include_assets_files=False)
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    app.index_string = _INDEX.replace("STYLE", style)
    latest = [find_choices(folder)]

    def layout() -> Any:
        latest[0] = find_choices(folder)
        return page_layout(latest[0])

    def asked(page: str, call: Callable[[Wish], Any], told: Mapping[str, Any], failed: Callable[[str], Any]) -> Any:
        try:
            found = ask(page, call, make_wish(latest[0], **told))
        except VramplanError as error:
            return failed(str(error))
        if found is None:
            raise PreventUpdate
        return found

    app.layout = layout
    _dress_figures(app)

    @app.callback([Output(name, "value") for name in COUNTS], Input("model", "value"), prevent_initial_call=True)
    def forget(_: str) -> list[None]:
        """Another model has sizes of its own."""
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
        """The plan for what is chosen."""
        if not chosen["model"] or not chosen["device"]:
            raise PreventUpdate
        told = {"allow": allow or None, **chosen}
        found = asked(page, answer, told, lambda text: Answer(error=text))
        picture = json.loads(found.picture) if found.picture else None
        hopeless = found.error and not found.short
        return answer_view(found), picture, None if hopeless else told, usual_numbers(found), not found.video

    @app.callback(
        Output("memory-plain", "data"), Output("words", "children"), Output("helps", "children"),
        Input("planned", "data"), State("page", "data"),
        running=[(Output("drawing", "hidden"), False, True)],
    )  # fmt: skip
    def go_on(told: dict[str, Any] | None, page: str) -> Any:
        """The picture of the plan, or what would make one fit."""
        if not told:
            return None, "", []
        found = asked(page, further, told, lambda text: Further(words=text))
        return json.loads(found.picture) if found.picture else None, found.words, helps_view(found)

    return app


def _dress_figures(app: Dash) -> None:
    """Figures get the page's colours in the browser, and get them again where the screen changes."""
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
