"""Price all candidates of a pool at once, as arrays over all of them.

If no component lingers on the device, each adds its share to a candidate's price independently of the others
(`Pricer.component_prices`): sums and maxima over axes equal the prices of `Pricer`, thousands of times faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import numpy as np

from vramplan.hardware.types import Budget
from vramplan.planner.columns import Column
from vramplan.planner.demand import Pricer
from vramplan.planner.order import Array, Prefer, first
from vramplan.planner.pool import CandidatePool
from vramplan.strategies import Decode, Placement

_ZERO: Array = np.zeros((), int)


class Table:
    """The prices of all candidates of a pool, in bytes and seconds.

    RAM and disk are the same for every decode. `decode` is one that is priced anyway: another might need a simulation.
    """

    def __init__(self, pool: CandidatePool, pricer: Pricer, decode: tuple[Decode, ...]) -> None:
        self.pool = pool
        self.pricer = pricer
        self.lengths = tuple(map(len, pool.axes))
        self._tables: dict[tuple[Decode, ...], tuple[Array, Array]] = {}
        columns = self._columns(decode)
        self.ram = self._whole(_ram(_stages(columns), loaded=pricer.loaded))
        self.disk = self._whole(_sum(column.disk for column in columns))
        self.quality = self._whole(_largest(column.quality for column in columns))
        self.custom = self._whole(_sum(column.custom for column in columns))
        self.offloaded = self._whole(_sum(column.offloaded for column in columns))

    def best(self, decode: tuple[Decode, ...], budget: Budget, prefer: Prefer) -> dict[str, Placement]:
        """Return the first in order among the candidates with the least deficit under this decode."""
        vram, seconds = self.vram_and_seconds(decode)
        short = _excess(self.ram, budget.ram_bytes)
        for needed, usable in ((vram, budget.vram_bytes), (self.disk, budget.disk_bytes)):
            short = short + _excess(needed, usable)
        place = first(
            prefer,
            np.flatnonzero(short == short.min()),
            self.if_slower(decode),
            seconds=seconds,
            quality=self.quality,
            changed=np.zeros_like(self.quality),  # the same for a whole pool
            custom=self.custom,
            offloaded=self.offloaded,
            ram_bytes=self.ram,
            vram_bytes=vram,
        )
        indices = np.unravel_index(place, self.lengths)
        return self.pool.merge(axis[int(index)] for axis, index in zip(self.pool.axes, indices, strict=True))

    def if_slower(self, decode: tuple[Decode, ...]) -> list[Array]:
        """Return the seconds per call with one term after the other slower (`rates.slower`)."""
        return list(self._vram_and_times(decode)[1][1:])

    def vram_and_seconds(self, decode: tuple[Decode, ...]) -> tuple[Array, Array]:
        """Return the reserved device memory in bytes, and the seconds per call."""
        vram, times = self._vram_and_times(decode)
        return vram, times[0]

    def _vram_and_times(self, decode: tuple[Decode, ...]) -> tuple[Array, Array]:
        found = self._tables.get(decode)
        if found is None:
            columns = self._columns(decode)
            vram = _largest(map(_vram, _stages(columns))) + self.pricer.workspace_bytes
            times = _sum(column.times for column in columns)
            found = self._tables[decode] = self._whole(vram), times.reshape(len(times), -1)
        return found

    def _columns(self, decode: tuple[Decode, ...]) -> list[Column]:
        found = []
        for place, axis in enumerate(self.pool.axes):
            shape = tuple(len(axis) if other == place else 1 for other in range(len(self.pool.axes)))
            for name in axis[0]:
                found.append(self.pricer.column(name, tuple(placed[name] for placed in axis), decode).shaped(shape))
        return found

    def _whole(self, values: Array) -> Array:
        return np.ascontiguousarray(np.broadcast_to(values, self.lengths)).ravel()


def _stages(columns: Sequence[Column]) -> list[list[Column]]:
    """Split columns into components that are freed before others are loaded, and the others."""
    return [[column for column in columns if column.freed is freed] for freed in (True, False)]


def _vram(stage: Sequence[Column]) -> Array:
    """Return the reserved memory while these run, outside of the denoising loop and within it: the weights of all that
    are there anyway, and the largest extra of one component."""
    return _largest(_vram_of(stage, in_loop=in_loop) for in_loop in (False, True))


def _vram_of(stage: Sequence[Column], *, in_loop: bool) -> Array:
    used = [column for column in stage if column.runs[in_loop]]
    if not used:
        return _ZERO
    beside = _sum(column.beside(in_loop=in_loop) for column in stage)
    return beside + _largest(column.extra(in_loop=in_loop) for column in used)


def _ram(stages: Sequence[Sequence[Column]], *, loaded: bool) -> Array:
    """Return the RAM at the highest of three times: encoding first, the rest of the call, and loading."""
    held = _largest(_sum(column.held for column in stage) for stage in stages)
    shared = _largest(column.shared for stage in stages for column in stage)
    running = held + shared + _largest(column.transient for stage in stages for column in stage)
    return running if loaded else _largest([running, *map(_loading, stages)])


def _loading(stage: Sequence[Column]) -> Array:
    """Return the peak of loading these in turn, those first that give back most (`load_order`)."""
    rest = [column.kept - column.peak for column in stage]
    totals = []
    for place, own in enumerate(rest):
        before = (
            np.where(other < own if later > place else other <= own, stage[later].kept, 0)
            for later, other in enumerate(rest)
            if later != place
        )
        totals.append(stage[place].peak + _sum(before))
    return _largest(totals)


def _sum(arrays: Iterable[Array]) -> Array:
    return reduce(np.add, arrays, _ZERO)


def _largest(arrays: Iterable[Array]) -> Array:
    """Return the element-wise maximum; 0 without arrays."""
    found = list(arrays)
    return reduce(np.maximum, found) if found else _ZERO


def _excess(needed: Array, usable: int | None) -> Array:
    return _ZERO if usable is None else _largest([needed - usable, _ZERO])
