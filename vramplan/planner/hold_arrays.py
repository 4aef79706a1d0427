"""Holds of many settings of one component as arrays, so that one pass of the cost model prices them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import numpy as np

from vramplan.strategies.base import Hold

# Fields that decide which formula of the cost model applies: the same for all holds of one array.
_SAME = attrgetter("lingers", "overlapped", "rate", "pageable", "unhidden", "from_file", "flat")
# Fields that the cost model multiplies and adds.
_AMOUNTS = (
    "moved_in_bytes",
    "moved_out_bytes",
    "waited_bytes",
    "disk_bytes",
    "pauses",
    "leaf_hooks",
    "read_bytes",
    "gathered_bytes",
    "entry_bytes",
    "entry_gathered_bytes",
)
# Fewer are priced one by one: an operation on an array takes about as long as so many on numbers.
_LEAST = 8


@dataclass(frozen=True, slots=True)
class _HoldArrays:
    """Holds that differ in amounts alone. Its attributes are those of a hold that the cost model reads."""

    first: Hold
    amounts: Mapping[str, np.ndarray[Any, Any]]

    def __getattr__(self, name: str) -> Any:
        found = self.amounts.get(name)
        return getattr(self.first, name) if found is None else found


def hold_arrays(holds: Sequence[Hold]) -> Iterator[tuple[list[int], Hold]]:
    """Yield the holds in groups that one pass prices, each with the indices of its holds: a hold, or arrays of many."""
    groups: dict[Any, list[int]] = {}
    for place, hold in enumerate(holds):
        groups.setdefault(_SAME(hold), []).append(place)
    for places in groups.values():
        if len(places) < _LEAST:
            yield from (([place], holds[place]) for place in places)
        else:
            own = [holds[place] for place in places]
            values = {name: np.array([getattr(hold, name) for hold in own]) for name in _AMOUNTS}
            arrays = _HoldArrays(own[0], {name: array for name, array in values.items() if array.any()})
            yield places, cast(Hold, arrays)
