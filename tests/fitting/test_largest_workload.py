"""Looking for the last that fits: it is the right one, few places are asked for, and none far beyond it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.api.fit import _shortfall_function
from vramplan.api.plan import LeastMemory
from vramplan.errors import UsageError
from vramplan.fitting.largest_workload import last_fitting, last_within_limit, pixel_count
from vramplan.hardware.types import Hardware, Host
from vramplan.workload import Workload

SIDES = [side * side for side in range(8, 257)]  # as pixels in patches: what memory grows with


def counting(need: Callable[[int], float | None]) -> tuple[list[int], Callable[[int], float | None]]:
    asked: list[int] = []

    def counted(place: int) -> float | None:
        asked.append(place)
        return need(place)

    return asked, counted


@given(st.integers(0, 248), st.integers(-1, 249), st.sampled_from(["line", "square", "steps"]))
def test_it_is_the_last_that_fits_wherever_it_is_begun(start: int, last: int, kind: str) -> None:
    shapes = {
        "line": lambda x: 10.0 + 3 * x,
        "square": lambda x: 10.0 + 0.01 * x * x,
        "steps": lambda x: 10.0 + 1000 * (x // 1000),
    }
    needs = [shapes[kind](pixels) for pixels in SIDES]
    limit = -1.0 if last < 0 else needs[last] if last < len(needs) else 1e12
    asked, need = counting(lambda place: needs[place])
    found = last_within_limit(SIDES, need, limit, start)
    assert found == max((place for place, needed in enumerate(needs) if needed <= limit), default=-1)
    assert len(set(asked)) == len(asked) <= 20


def test_a_line_is_met_in_few_questions_and_nothing_large_is_asked_for() -> None:
    asked, need = counting(lambda place: 6.5 + SIDES[place] / 1000)
    assert last_within_limit(SIDES, need, 20.0, 56) == 108
    assert len(asked) <= 5
    assert max(SIDES[place] for place in asked) <= 2 * SIDES[108]


def test_what_cannot_be_at_all_is_too_much() -> None:
    asked, need = counting(lambda place: None if place > 100 else 5.0)
    assert last_within_limit(SIDES, need, 6.0, 56) == 100
    assert len(asked) <= 14


@pytest.mark.parametrize("last", [-1, 0, 3, 7, 8, 40, 63])
@pytest.mark.parametrize("start", [-1, 0, 7, 63])
def test_the_edge_is_found_from_a_guess(last: int, start: int) -> None:
    asked: set[int] = set()

    def fits(place: int) -> bool:
        assert place not in asked
        asked.add(place)
        return place <= last

    assert last_fitting(64, fits, start) == last
    assert asked >= {place for place in (last, last + 1) if 0 <= place < 64}
    if last == start:
        assert len(asked) <= 2


def test_memory_grows_with_pixels_frames_and_pictures() -> None:
    work = Workload(height=8, width=4, num_frames=5, num_images_per_prompt=2)
    assert pixel_count(work) == 8 * 4 * 5 * 2


def test_the_way_to_decode_is_kept_but_for_what_is_too_small_for_it() -> None:
    asked: list[tuple[int, int, object]] = []

    class Subject:
        def least_memory(self, work: Workload, *_: object, decode: Any = None) -> LeastMemory | None:
            asked.append((work.height, work.num_images_per_prompt, decode))
            if decode is not None and work.height < 512:
                raise UsageError("no larger than a tile")
            tiles = ("tiles", work.num_images_per_prompt)
            return LeastMemory(vram_bytes=work.height, limit_bytes=1000, decode=tiles) if work.height < 4096 else None

    machine = Hardware(accelerators=(), host=Host(total_bytes=1, available_bytes=1))
    short = _shortfall_function(Subject(), machine, None, lambda text: None)
    works = [Workload(height=height, width=8) for height in (1024, 2048, 256, 4096)]
    assert [short(work) for work in works] == [24, 1048, -744, None]
    assert [decode for _, _, decode in asked] == [None, ("tiles", 1), ("tiles", 1), None, ("tiles", 1)]
    asked.clear()
    for _ in range(2):
        short(Workload(height=1024, width=8, num_images_per_prompt=2))
    assert [decode for _, _, decode in asked] == [None, ("tiles", 2)]
