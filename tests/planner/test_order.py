"""Two candidates are as fast only where the difference between them is not sure; then the simpler is first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vramplan.planner.order import first, first_of, surely_faster

OFF = {"computing": 1.5, "pinned": 3.0, "pageable": 3.0}


def if_slower(terms: dict[str, float]) -> dict[str, float]:
    """A candidate that takes these terms, one after the other, with each of them slower."""
    total = sum(terms.values())
    return {term: total + terms.get(term, 0.0) * (factor - 1) for term, factor in OFF.items()}


def candidate(terms: dict[str, float], **values: Any) -> tuple[dict[str, Any], dict[str, float]]:
    plain = {"quality": 0, "changed": 0, "custom": 0, "offloaded": 0, "ram_bytes": 0, "vram_bytes": 0}
    return {**plain, "seconds": sum(terms.values()), **values}, if_slower(terms)


def test_what_both_wait_for_cancels() -> None:
    """The computing is 50 % uncertain, the transfer that one of them saves three times over: it is saved for sure."""
    slow, fast = candidate({"computing": 60, "pinned": 2}), candidate({"computing": 60, "pinned": 1}, offloaded=2)
    assert surely_faster(fast[1], slow[1])
    assert not surely_faster(slow[1], fast[1])
    assert first_of("speed", [slow, fast]) == 1


@pytest.mark.parametrize(("saved", "chosen"), [(3.1, 1), (2.9, 0)])
def test_a_trade_of_one_term_for_another_is_sure_only_beyond_what_it_may_be_off(saved: float, chosen: int) -> None:
    """One second of pinned copies in place of `saved` seconds of pageable ones, with one component more offloaded."""
    simple = candidate({"computing": 60, "pageable": saved}, offloaded=1)
    fast = candidate({"computing": 60, "pinned": 1}, offloaded=2)
    assert first_of("speed", [simple, fast]) == chosen
    assert surely_faster(fast[1], simple[1]) is (chosen == 1)


def test_among_equals_quality_comes_before_less_offloading_and_time_last() -> None:
    fast = candidate({"computing": 60, "pinned": 1}, quality=1)
    offloading = candidate({"computing": 60, "pageable": 2}, offloaded=2)
    slower = candidate({"computing": 60, "pageable": 2.5}, offloaded=2)
    assert first_of("speed", [fast, slower, offloading]) == 2
    assert first_of("speed", [candidate({"computing": 60, "pinned": 1}, changed=1), slower]) == 1
    assert first_of("speed", [candidate({"computing": 60, "pinned": 1}, custom=1), slower]) == 1


def test_least_memory_comes_first_where_it_is_preferred() -> None:
    small = candidate({"computing": 90}, vram_bytes=1)
    fast = candidate({"computing": 60}, vram_bytes=2)
    assert first_of("memory", [fast, small]) == 1
    assert first_of("speed", [fast, small]) == 0


def test_without_a_known_uncertainty_three_digits_decide() -> None:
    values = [
        {**candidate({"computing": seconds})[0], "offloaded": count} for seconds, count in ((60.0, 2), (60.04, 1))
    ]
    assert first_of("speed", [(item, {}) for item in values]) == 1
    values[1]["seconds"] = 60.2
    assert first_of("speed", [(item, {}) for item in values]) == 0
    assert surely_faster({}, {})


def test_one_that_another_is_surely_faster_than_is_not_taken_for_being_simple() -> None:
    """The simplest may be slower than the fastest by a trade, but not than a third that waits for the same."""
    fastest = candidate({"computing": 60, "pinned": 1}, offloaded=3)
    between = candidate({"computing": 60, "pageable": 1.5}, offloaded=2)
    simplest = candidate({"computing": 60, "pageable": 2.5}, offloaded=1)
    assert first_of("speed", [fastest, simplest]) == 1
    assert first_of("speed", [fastest, between, simplest]) == 1


def test_only_the_kept_ones_are_compared() -> None:
    items = [candidate({"computing": seconds}) for seconds in (50, 60, 70)]
    values = {name: np.array([item[0][name] for item in items]) for name in items[0][0]}
    longer = [np.array([item[1][term] for item in items]) for term in OFF]
    assert first("speed", np.array([1, 2]), longer, **values) == 1
