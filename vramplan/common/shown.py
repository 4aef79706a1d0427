"""Values that print themselves, in a terminal and in a notebook."""

from __future__ import annotations

from importlib import import_module

# The view module of each value type, imported by name at run time: values do not depend on the views above them.
VIEWS = {
    "Fits": "vramplan.view.fits",
    "Hardware": "vramplan.view.machine",
    "Plan": "vramplan.view.plan",
    "Simulation": "vramplan.view.simulation",
}


class Shown:
    """A value that prints itself through its view module in `VIEWS`, which has `text_of` and `html_of`."""

    __slots__ = ()

    def __str__(self) -> str:
        return str(import_module(VIEWS[type(self).__name__]).text_of(self))

    def _repr_html_(self) -> str:
        return str(import_module(VIEWS[type(self).__name__]).html_of(self))
