"""The largest of a row of workloads that fits: by price, along a line through what was found, then for certain."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

from vramplan.workload import Workload

# Nothing more than this times as large as what fits is looked at next: a larger call takes longer to simulate.
_STRIDE = 2.0
# A line that is no nearer after so many guesses gives way to halving.
_GUESSES = 6


def pixel_count(work: Workload) -> int:
    """What memory grows with: pixels of all frames of all pictures."""
    return work.height * work.width * work.num_frames * work.num_images_per_prompt


def last_within_limit(amounts: Sequence[float], need: Callable[[int], float | None], limit: float, start: int) -> int:
    """The last place that needs no more than the limit, where need grows with the amount; -1 where none does.

    `amounts` go up; `need` is None where there is no telling but that it is too much. It is asked for few places, first
    for `start`, and for none far beyond the answer.
    """
    found: dict[int, float] = {}
    low, high, place, asked = -1, len(amounts), start, 0
    while high - low > 1:
        needed = need(place)
        asked += 1
        if needed is not None:
            found[place] = needed
        low, high = (place, high) if needed is not None and needed <= limit else (low, place)
        guess = (low + high) // 2 if asked > _GUESSES and high < len(amounts) else _guess(amounts, found, limit, place)
        if high == len(amounts) and low >= 0:
            guess = min(guess, _last_up_to(amounts, amounts[low] * _STRIDE))
        place = max(low + 1, min(guess, high - 1))
    return low


def _guess(amounts: Sequence[float], found: Mapping[int, float], limit: float, last: int) -> int:
    """Where the line through the two places nearest to the limit meets it; twice or half as far without two."""
    near = sorted(found, key=lambda place: abs(found[place] - limit))[:2]
    if len(near) == 2:
        (one, other) = near
        slope = (found[one] - found[other]) / (amounts[one] - amounts[other])
        if slope > 0:
            return _last_up_to(amounts, amounts[one] + (limit - found[one]) / slope)
    fits = last in found and found[last] <= limit
    return _last_up_to(amounts, amounts[last] * _STRIDE if fits else amounts[last] / _STRIDE)


def _last_up_to(amounts: Sequence[float], wanted: float) -> int:
    """The last place with no more than this."""
    return bisect_right(amounts, wanted) - 1


def last_fitting(count: int, fits: Callable[[int], bool], start: int) -> int:
    """The last of so many places that fits, all before it taken to fit and none after it; -1 where none does.

    It and the next one have been asked for, and otherwise places near `start`, where it is looked for first.
    """
    low, high, step = -1, count, 1
    place = max(0, min(start, count - 1))
    while high - low > 1:
        if fits(place):
            low = place
            place = min(place + step, high - 1) if high == count else (low + high) // 2
        else:
            high = place
            place = max(place - step, 0) if low == -1 else (low + high) // 2
        step *= 2
    return low
