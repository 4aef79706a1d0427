"""A bar where somebody sees it, and none where nobody does."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import diffusers
import pytest
from make_pipeline import build
from test_staged import MACHINE, loaded, make_plan

import vramplan
from vramplan import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stderr(request, monkeypatch) -> io.StringIO:
    """Standard error, and diffusers' bars as a user has them who has not switched them off."""
    kind = getattr(request, "param", "terminal")
    written = io.StringIO() if kind == "pipe" else Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    monkeypatch.setattr(diffusers.utils.logging, "_tqdm_active", kind != "quiet")
    return written


def load(small_folder):
    plan = make_plan(small_folder("sd15-small"), settings={"placement": "resident"})
    return loaded(plan, small_folder("sd15-small"), say=lambda text: print(text, file=sys.stderr))


def test_a_terminal_is_shown_how_far_loading_is(stderr, small_folder) -> None:
    load(small_folder)
    told = stderr.getvalue()
    assert "loading:   0%" in told
    assert "loading: 100%" in told
    assert "\rloading unet: " in told  # on a line of its own: the bar was taken off first
    assert told.rstrip(" \r").endswith("\n") or "loading" not in told.rpartition("\r")[2]  # and is gone at the end


def test_applying_moves_the_bar_by_the_bytes_of_each_component(stderr) -> None:
    pipe = build("sd15-small")
    plan = vramplan.plan(pipe, device=MACHINE, height=64, width=64, settings={"placement": "resident"})
    assert stderr.getvalue() == ""  # simulating moves nothing
    vramplan.apply_plan(pipe, plan, device="cpu")
    assert "applying the plan: 100%" in stderr.getvalue()


@pytest.mark.parametrize("stderr", ["pipe", "quiet"], indirect=True)
def test_nobody_sees_a_bar_in_a_pipe_or_where_they_are_off(stderr, small_folder) -> None:
    found = load(small_folder)
    found.applied.undo()
    vramplan.apply_plan(found.applied.pipe, found.applied.plan, device="cpu")
    assert "%" not in stderr.getvalue()


def test_what_is_over_at_once_shows_no_bar(stderr, monkeypatch, small_folder) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 60.0)
    load(small_folder)
    assert "loading:" not in stderr.getvalue()


@pytest.mark.parametrize("stderr", ["pipe"], indirect=True)
def test_a_notebook_is_shown_one_though_it_is_no_terminal(stderr, monkeypatch) -> None:
    assert not progress.progress_shown()
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    assert progress.progress_shown()
