"""Whatever is done to a plan's file: it is read as a plan or refused in one clear line, at once, and runs nothing.

`VRAMPLAN_FUZZ=10000` tries as many; `benchmarks/plan_fuzz.py` does the same outside of the suite.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.support.mutations import LAUGHS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import plan_fuzz

import vramplan
from vramplan.errors import VramplanError
from vramplan.planfile.file import dump_plan, load_plan

COUNT = int(os.environ.get("VRAMPLAN_FUZZ", "200"))


@pytest.fixture(scope="module")
def text(small_folder):
    made = vramplan.plan(str(small_folder("sd15-small")), device=plan_fuzz.MACHINE, height=64, width=64, simulate=False)
    return dump_plan(made)


def test_every_mutant_ends_in_a_plan_or_in_one_clear_line(text, monkeypatch):
    ran = []
    monkeypatch.setattr("os.system", lambda *_: ran.append("os.system"))
    head = text[: text.index("candidates:")]
    ends, slowest = plan_fuzz.fuzzed([text, head, head], COUNT, seed=1)
    assert not ran
    assert ends["refused"] > COUNT / 3  # the mutations hit
    assert ends["a plan"] > COUNT / 100  # and not only what is refused at the first look
    assert slowest < 5  # a second on a machine that does nothing else


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("aliases", lambda text: text + LAUGHS),
        ("depth", lambda text: text + "more: " + "[" * 500_000),
        ("width", lambda text: text + "more: [" + "1," * 500_000 + "]"),
        ("sixties", lambda text: text + "more: 1" + ":59" * 300_000),
        ("sixties and a fraction", lambda text: text + "more: 1" + ":59" * 300 + ".5"),
        ("digits", lambda text: text + "more: " + "9" * 1_000_000),
        ("a word", lambda text: text + 'more: "' + "x" * 1_000_000 + '"'),
        ("more than a plan", lambda text: text + "# " + "x" * (1 << 24)),
        ("keys", lambda text: text + "more: {" + ", ".join(f"k{n}: 1" for n in range(100_000)) + "}"),
        ("quotes", lambda text: text + "more: " + "'" * 900_001),
        ("documents", lambda text: text + "---\n" * 200_000),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_take_long_is_refused_at_once(text, tmp_path, name, make):
    path = tmp_path / "plan.yaml"
    path.write_text(make(text))
    started = time.perf_counter()
    with pytest.raises(VramplanError) as caught:
        load_plan(path)
    assert time.perf_counter() - started < 5
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_file_without_end_is_refused():
    with pytest.raises(VramplanError, match="not a plan"):
        load_plan("/dev/zero")
