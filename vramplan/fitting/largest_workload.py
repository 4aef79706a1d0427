"""Find the largest workload that fits: first by price, with linear interpolation, then by simulation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

from vramplan.workload import Workload

# The largest step up from a workload that fits: a larger call takes longer to simulate.
_STRIDE = 2.0
# Interpolation gives way to bisection after this many guesses.
_GUESSES = 6


def pixel_count(work: Workload) -> int:
    """The pixels of all frames of all pictures, which memory grows with."""
    return work.height * work.width * work.num_frames * work.num_images_per_prompt


def last_within_limit(amounts: Sequence[float], need: Callable[[int], float | None], limit: float, start: int) -> int:
    """The last index whose need is within the limit; -1 if there is none. Need must grow with the amount.

    `amounts` is ascending; `need` returns None for an unknown need above the limit. It is called for few indices, first
    for `start`, and for none far beyond the answer.
    """
    found: dict[int, float] = {}
    low, high, index, calls = -1, len(amounts), start, 0
    while high - low > 1:
        needed = need(index)
        calls += 1
        if needed is not None:
            found[index] = needed
        low, high = (index, high) if needed is not None and needed <= limit else (low, index)
        guess = (low + high) // 2 if calls > _GUESSES and high < len(amounts) else _guess(amounts, found, limit, index)
        if high == len(amounts) and low >= 0:
            guess = min(guess, _last_up_to(amounts, amounts[low] * _STRIDE))
        index = max(low + 1, min(guess, high - 1))
    return low


def _guess(amounts: Sequence[float], found: Mapping[int, float], limit: float, last: int) -> int:
    """The index where the line through the two needs nearest to the limit meets it; without two, twice or half the
    amount of the `last` index."""
    near = sorted(found, key=lambda index: abs(found[index] - limit))[:2]
    if len(near) == 2:
        (one, other) = near
        slope = (found[one] - found[other]) / (amounts[one] - amounts[other])
        if slope > 0:
            return _last_up_to(amounts, amounts[one] + (limit - found[one]) / slope)
    fits = last in found and found[last] <= limit
    return _last_up_to(amounts, amounts[last] * _STRIDE if fits else amounts[last] / _STRIDE)


def _last_up_to(amounts: Sequence[float], wanted: float) -> int:
    """The last index with at most the `wanted` amount."""
    return bisect_right(amounts, wanted) - 1


def last_fitting(count: int, fits: Callable[[int], bool], start: int) -> int:
    """The last of `count` indices that fits, -1 if none does. All before it are assumed to fit, and none after it.

    `fits` is called for that index, for the next one, and otherwise for indices near `start`, where the search begins.
    """
    low, high, step = -1, count, 1
    index = max(0, min(start, count - 1))
    while high - low > 1:
        if fits(index):
            low = index
            index = min(index + step, high - 1) if high == count else (low + high) // 2
        else:
            high = index
            index = max(index - step, 0) if low == -1 else (low + high) // 2
        step *= 2
    return low
