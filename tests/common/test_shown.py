"""Values print themselves through the view of their row."""

from __future__ import annotations

from importlib import import_module

import pytest

import vramplan
from vramplan.common.shown import VIEWS, Shown
from vramplan.hardware.types import Hardware, Host
from vramplan.units import GIB


@pytest.mark.parametrize("name", VIEWS)
def test_each_row_resolves(name: str) -> None:
    assert issubclass(getattr(vramplan, name), Shown)
    view = import_module(VIEWS[name])
    assert callable(view.text_of)
    assert callable(view.html_of)


def test_every_shown_value_has_a_row() -> None:
    for name in VIEWS:
        getattr(vramplan, name)
    assert {kind.__name__ for kind in Shown.__subclasses__()} == set(VIEWS)


def test_a_value_prints_as_its_view_has_it() -> None:
    machine = Hardware(accelerators=(), host=Host(total_bytes=8 * GIB, available_bytes=6 * GIB))
    assert "none found: plans are for the CPU" in str(machine)
    assert machine._repr_html_().startswith("<pre")
