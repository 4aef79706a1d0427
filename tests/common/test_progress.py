"""A bar where somebody sees it, and none where nobody does."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest

import vramplan
from tests.runtime.test_staged import MACHINE, loaded, make_plan
from vramplan.common import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def stderr(kind: str = "terminal", seconds: float = 0.0) -> Iterator[io.StringIO]:
    """Standard error of some kind, diffusers' bars as they are unless somebody switched them `off`."""
    written = io.StringIO() if kind == "pipe" else Terminal()
    with pytest.MonkeyPatch.context() as patched, redirect_stderr(written):
        patched.setattr(progress, "_DELAY", seconds)
        patched.setattr(diffusers.utils.logging, "_tqdm_active", kind != "off")
        yield written


def load(folder: Any) -> Any:
    plan = make_plan(folder, settings={"placement": "resident"})
    return loaded(plan, folder, say=lambda text: print(text, file=sys.stderr))


def test_a_terminal_is_shown_how_far_loading_is(small_folder) -> None:
    folder = small_folder("sd15-small")
    with stderr() as written:
        load(folder)
    told = written.getvalue()
    assert "loading:   0%" in told
    assert "loading: 100%" in told
    assert "\rloading unet: " in told  # on a line of its own: the bar was taken off first


def test_applying_moves_the_bar_and_simulating_does_not(small_pipeline) -> None:
    pipe = small_pipeline("sd15-small")
    with stderr() as written:
        plan = vramplan.plan(pipe, device=MACHINE, height=64, width=64, settings={"placement": "resident"})
        assert written.getvalue() == ""
        vramplan.apply_plan(pipe, plan, device="cpu")
    assert "applying the plan: 100%" in written.getvalue()


@pytest.mark.parametrize("kind", ["pipe", "off"])
def test_nobody_sees_a_bar_in_a_pipe_or_where_they_are_off(small_folder, kind) -> None:
    folder = small_folder("sd15-small")
    with stderr(kind) as written:
        found = load(folder).applied
        vramplan.apply_plan(found.undo(), found.plan, device="cpu")
    assert "applying the plan" not in written.getvalue()
    assert "loading: " not in written.getvalue()


def test_what_is_over_at_once_shows_no_bar(small_pipeline) -> None:
    pipe = small_pipeline("sd15-small")
    plan = vramplan.plan(pipe, device=MACHINE, height=64, width=64, simulate=False)
    with stderr(seconds=600.0) as written:
        vramplan.apply_plan(pipe, plan, device="cpu")
    assert written.getvalue() == ""


def test_a_notebook_is_shown_one_though_it_is_no_terminal(monkeypatch) -> None:
    with stderr("pipe"):
        assert not progress.can_show_progress()
        terminal, notebook = SimpleNamespace(), SimpleNamespace(kernel=SimpleNamespace())
        for shell, shown in ((None, False), (terminal, False), (notebook, True)):
            there = SimpleNamespace(get_ipython=lambda shell=shell: shell)
            monkeypatch.setitem(sys.modules, "IPython", there)
            assert progress.can_show_progress() is shown
