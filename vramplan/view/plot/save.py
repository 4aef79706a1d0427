"""Write a picture to a file, in the format of its suffix."""

from __future__ import annotations

from base64 import b64encode
from importlib.util import find_spec
from pathlib import Path

from vramplan.calibration.records import Usage
from vramplan.errors import UsageError, VramplanError
from vramplan.planfile.types import Plan
from vramplan.simulator.types import Simulation

# The package that draws each format.
_PACKAGES = {".svg": "matplotlib", ".png": "matplotlib", ".html": "plotly"}


def check_picture(path: str | Path) -> None:
    """Check that a picture can be written, before the work for it.

    Raises:
        UsageError: a format other than SVG, PNG or HTML, or a missing folder.
        VramplanError: the package that draws it is not installed.
    """
    form = Path(path).suffix.lower()
    if form not in _PACKAGES:
        raise UsageError(f"{path}: give a name that ends in {', '.join(_PACKAGES)}")
    if not Path(path).parent.is_dir():
        raise UsageError(f"{path}: its folder does not exist")
    if find_spec(_PACKAGES[form]) is None:
        raise VramplanError(f"{path} needs {_PACKAGES[form]}: pip install 'vramplan[plot]'")


def save_picture(path: str | Path, shown: Simulation | Plan, measured: Usage | None = None) -> None:
    """Write the memory over a simulated call, or the candidates of a plan: `.svg`, `.png` or `.html`.

    The peaks of a `measured` call are drawn on the same axes.

    Raises:
        VramplanError: there is nothing to draw, or it cannot be written; UsageError: as `check_picture`.
    """
    check_picture(path)
    from vramplan.common.files import write_bytes

    form = Path(path).suffix.lower()
    drawn = _draw_page(shown, measured) if form == ".html" else _draw_image(shown, form.removeprefix("."), measured)
    write_bytes(path, drawn)


def picture_html(shown: Simulation | Plan) -> str:
    """The picture for a notebook; empty if matplotlib is not installed or there is nothing to draw."""
    if find_spec("matplotlib") is None:
        return ""
    try:
        content = b64encode(_draw_image(shown, "png")).decode()
    except VramplanError:
        return ""
    return f'<img alt="memory" style="max-width: 100%" src="data:image/png;base64,{content}">'


def _draw_image(shown: Simulation | Plan, form: str, measured: Usage | None = None) -> bytes:
    from vramplan.view.plot.candidates import candidates_picture
    from vramplan.view.plot.matplotlib_figures import draw_candidates, draw_memory, to_bytes
    from vramplan.view.plot.memory import memory_picture

    if isinstance(shown, Plan):
        return to_bytes(draw_candidates(candidates_picture(shown, measured)), form)
    return to_bytes(draw_memory(memory_picture(shown, measured)), form)


def _draw_page(shown: Simulation | Plan, measured: Usage | None) -> bytes:
    from vramplan.view.plot.candidates import candidates_picture
    from vramplan.view.plot.memory import memory_picture
    from vramplan.view.plot.plotly_figures import candidates_page, memory_page

    if isinstance(shown, Plan):
        return candidates_page(candidates_picture(shown, measured)).encode()
    return memory_page(memory_picture(shown, measured)).encode()
