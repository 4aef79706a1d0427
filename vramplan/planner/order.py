"""The order of candidates: by time or by memory; among ties, the plan that changes less and is simpler."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Prefer = Literal["speed", "memory"]
Verdict = Literal["chosen", "fits", "rejected"]
Array = npt.NDArray[Any]
# Significant digits of times: equal up to the third is a tie. Among equally simple plans the fifth counts, so that no
# memory is left unused that would save time.
_DIGITS, _FINER = 3, 5
_APART = 10.0 ** (1 - _DIGITS) / 2  # times this share apart differ in the third digit


def rounded(value: float, digits: int) -> float:
    """Round a value to significant digits; 0 keeps all."""
    return float(f"{value:.{digits}g}") if digits else value


def order(
    prefer: Prefer,
    *,
    seconds: Any,
    quality: Any,
    changed: Any,
    custom: Any,
    offloaded: Any,
    ram_bytes: Any,
    vram_bytes: Any,
) -> tuple[tuple[Any, int], ...]:
    """Return the values to compare in turn, lower being better, each with its digits (`rounded`).

    Values are of one candidate, or of many as arrays: seconds per call; the index of the quality; the number of
    components with changed weights, of those under settings that are not stock, and of offloaded ones; bytes. RAM comes
    before VRAM: of two equally fast plans the one that offloads less is the simpler.
    """
    time = seconds, _DIGITS
    simpler = (quality, 0), (changed, 0), (custom, 0), (offloaded, 0), (seconds, _FINER), (ram_bytes, 0)
    if prefer == "speed":
        return time, *simpler, (vram_bytes, 0)
    return (vram_bytes + ram_bytes * (vram_bytes == 0), 0), time, *simpler


def first(prefer: Prefer, kept: Array, if_slower: Sequence[Array] = (), **values: Array) -> int:
    """Return the first in order of the candidates at the indices `kept`; `values` are those of `order`, as arrays.

    Of the values only those are compared in turn that no other is surely faster than: `if_slower` are the seconds of
    all with one term after the other slower (`rates.slower`).
    """
    keys = order(prefer, **values)
    place = next(place for place, (_, digits) in enumerate(keys) if digits == _DIGITS)
    kept = _narrowed(keys[:place], kept)
    if not if_slower:
        return int(_narrowed(keys[place:], kept)[0])
    seconds = values["seconds"]
    fastest = int(_narrowed(keys[place:], kept)[0])
    while True:
        kept = kept[~_surely_slower(seconds, if_slower, kept, fastest)]
        chosen = int(_narrowed(keys[place + 1 :], kept)[0])
        better = kept[_surely_faster(seconds, if_slower, kept, chosen)]
        if not len(better):
            return chosen
        fastest = int(better[np.argmin(seconds[better])])


def surely_faster(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether the candidate with these `seconds_if_slower` is faster than another whichever term is slower.

    What both wait for is slower in both, and does not decide. True where how far times are off is not known.
    """
    return all(one[term] < other[term] for term in one)


def first_of(prefer: Prefer, items: Iterable[tuple[Mapping[str, Any], Mapping[str, float]]]) -> int:
    """Return the index of the first in order of some candidates, each with its values (`order`) and
    `seconds_if_slower`."""
    values, slower = zip(*items, strict=True)
    terms = set.intersection(*map(set, slower))
    return first(
        prefer,
        np.arange(len(values)),
        [np.array([seconds[term] for seconds in slower]) for term in terms],
        **{name: np.array([each[name] for each in values]) for name in values[0]},
    )


def _surely_slower(seconds: Array, if_slower: Sequence[Array], kept: Array, other: int) -> Array:
    """Return of each of the kept whether it is slower than the other in the third digit, whichever term is slower."""
    slower = [seconds[kept] > seconds[other] * (1 + _APART), *(times[kept] > times[other] for times in if_slower)]
    return np.asarray(np.logical_and.reduce(slower))


def _surely_faster(seconds: Array, if_slower: Sequence[Array], kept: Array, other: int) -> Array:
    faster = [seconds[kept] * (1 + _APART) < seconds[other], *(times[kept] < times[other] for times in if_slower)]
    return np.asarray(np.logical_and.reduce(faster))


def _narrowed(keys: Sequence[tuple[Any, int]], kept: Array) -> Array:
    """Return the kept indices with the lowest values, compared in turn."""
    for compared, digits in keys:
        kept = _lowest(compared, kept, digits) if len(kept) > 1 else kept
    return kept


def _lowest(values: Array, kept: Array, digits: int) -> Array:
    """Return the kept indices with the lowest value, compared to so many digits."""
    found = values[kept]
    if not digits:
        same: Array = kept[found == found.min()]
        return same
    near: Array = kept[found <= found.min() * (1 + 10.0 ** (2 - digits))]  # more than one in the last digit
    every = np.unique(values[near]).tolist()  # in order, as their rounded values are: the lowest come first
    same_digits = bisect_right(every, rounded(every[0], digits), key=lambda value: rounded(value, digits))
    lowest: Array = near[values[near] <= every[same_digits - 1]]
    return lowest
