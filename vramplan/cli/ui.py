"""The command that opens the page: ui."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(1, 65535), help="A free one where left out.")
@click.option("--open/--no-open", "opens", default=True, show_default=True, help="Open it in the browser.")
def ui(folder: Path | None, port: int | None, *, opens: bool) -> None:
    """Open a page on this machine to try models, cards and sizes: the profiles, and the pipelines in FOLDER.

    Only this machine can reach it, and no file outside FOLDER is read. Prints its address; Ctrl-C ends it.
    """
    import webbrowser

    from vramplan.ui.serve import can_open_browser, serve

    def say(address: str) -> None:
        click.echo(address)
        if opens and can_open_browser():
            webbrowser.open(address)

    serve(folder, port, say)
