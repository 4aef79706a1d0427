"""Every mix of a pool at once: what each needs and takes, as arrays over all of them.

Where nothing lingers on the device, each component adds its part to a candidate's price whatever the others are under
(`Pricer.part`): sums and maxima over axes are the prices that `Pricer` gives one by one, thousands of times faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from vramplan.hardware.types import Budget
from vramplan.planner.candidates import CandidatePool
from vramplan.planner.demand import ComponentPrice, Pricer
from vramplan.planner.loading import Load
from vramplan.planner.order import Prefer, order, rounded
from vramplan.strategies import Decode, Placement
from vramplan.strategies.base import QUALITIES
from vramplan.strategies.resident import Resident

Array = npt.NDArray[Any]
_NOTHING: Array = np.zeros((), int)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """One component over its axis: its setting and part at each place, and how its arrays lie among those of others."""

    settings: Sequence[Placement]
    parts: Sequence[ComponentPrice]
    shape: tuple[int, ...]

    @property
    def freed(self) -> bool:
        """Whether the component is gone before others are loaded; the same at each place of a pool."""
        return self.parts[0].hold.freed

    def over(self, figure: Callable[[ComponentPrice], float]) -> Array:
        """A figure of each part."""
        return self._shaped([figure(part) for part in self.parts])

    def of_loads(self, figure: Callable[[Load], int]) -> Array:
        """A figure of each part's loading."""
        return self._shaped([figure(part.load) for part in self.parts if part.load is not None])

    def of_settings(self, figure: Callable[[Placement], int]) -> Array:
        """A figure of each setting."""
        return self._shaped([figure(setting) for setting in self.settings])

    def _shaped(self, values: Sequence[float]) -> Array:
        return np.array(values).reshape(self.shape)


class Table:
    """The prices of every mix of a pool. Sizes in bytes, times in seconds.

    RAM and disk are the same under every decode; the one given is one that is asked for anyway, as to price another
    could take a simulation.
    """

    def __init__(self, pool: CandidatePool, pricer: Pricer, decode: tuple[Decode, ...]) -> None:
        self.pool = pool
        self.pricer = pricer
        self.lengths = tuple(map(len, pool.axes))
        columns = self._columns(decode)
        self.ram = self._whole(_ram(_stages(columns), loaded=pricer.loaded))
        self.disk = self._whole(_sum(column.over(lambda part: part.hold.disk_bytes) for column in columns))
        self.quality = self._whole(_largest(column.of_settings(_quality) for column in columns))
        self.offloaded = self._whole(_sum(column.of_settings(_offloaded) for column in columns))
        self._under: dict[tuple[Decode, ...], tuple[Array, Array]] = {}

    def best(self, decode: tuple[Decode, ...], budget: Budget, prefer: Prefer) -> dict[str, Placement]:
        """The first in order of those that are short by least, decoded so."""
        vram, seconds = self.under(decode)
        short = _over(self.ram, budget.ram_bytes)
        for needed, usable in ((vram, budget.vram_bytes), (self.disk, budget.disk_bytes)):
            short = short + _over(needed, usable)
        kept = _lowest(short, np.arange(len(short)), 0)
        ordered = order(
            prefer,
            seconds=seconds,
            quality=self.quality,
            changed=np.zeros_like(self.quality),  # all of a pool are of the same form
            offloaded=self.offloaded,
            ram_bytes=self.ram,
            vram_bytes=vram,
        )
        for values, digits in ordered:
            kept = _lowest(values, kept, digits) if len(kept) > 1 else kept
        place = np.unravel_index(int(kept[0]), self.lengths)
        return self.pool.mix(axis[int(index)] for axis, index in zip(self.pool.axes, place, strict=True))

    def under(self, decode: tuple[Decode, ...]) -> tuple[Array, Array]:
        """What is reserved on the device, and the seconds of a call."""
        found = self._under.get(decode)
        if found is None:
            columns = self._columns(decode)
            vram = _largest(map(_vram, _stages(columns))) + self.pricer.workspace_bytes
            seconds = _sum(column.over(lambda part: part.seconds) for column in columns)
            found = self._under[decode] = self._whole(vram), self._whole(seconds)
        return found

    def _columns(self, decode: tuple[Decode, ...]) -> list[_Column]:
        found = []
        for place, axis in enumerate(self.pool.axes):
            shape = tuple(len(axis) if other == place else 1 for other in range(len(self.pool.axes)))
            for name in axis[0]:
                settings = [placed[name] for placed in axis]
                parts = [self.pricer.part(name, setting, decode) for setting in settings]
                found.append(_Column(settings=settings, parts=parts, shape=shape))
        return found

    def _whole(self, values: Array) -> Array:
        return np.ascontiguousarray(np.broadcast_to(values, self.lengths)).ravel()


def _stages(columns: Sequence[_Column]) -> list[list[_Column]]:
    """Those that are gone before others are loaded, and the others."""
    return [[column for column in columns if column.freed is freed] for freed in (True, False)]


def _vram(stage: Sequence[_Column]) -> Array:
    """What is reserved while these run: what lies idle of them, and the most that one of them takes beside."""
    used = [column for column in stage if column.parts[0].extra_bytes is not None]
    if not used:
        return _NOTHING
    idle = _sum(column.over(lambda part: part.hold.idle_bytes) for column in stage)
    return idle + _largest(column.over(lambda part: part.extra_bytes or 0) for column in used)


def _ram(stages: Sequence[Sequence[_Column]], *, loaded: bool) -> Array:
    """RAM at the highest of three times: while what goes first encodes, from then on, and while loading."""
    held = _largest(
        _sum(column.over(lambda part: part.hold.host_bytes + part.hold.pinned_bytes) for column in stage)
        for stage in stages
    )
    running = held + _largest(
        column.over(lambda part: _transient(part, loaded)) for stage in stages for column in stage
    )
    return running if loaded else _largest([running, *map(_loading, stages)])


def _transient(part: ComponentPrice, loaded: bool) -> int:
    """What a component takes of RAM beside what it holds: while its plan is applied, or whenever files are read."""
    return part.hold.host_transient_bytes if loaded or part.hold.disk_bytes else 0


def _loading(stage: Sequence[_Column]) -> Array:
    """The highest moment of loading these one after another, those first that give back most (`load_order`)."""
    kept = [column.of_loads(lambda load: load.kept_bytes) for column in stage]
    peak = [column.of_loads(lambda load: load.peak_bytes) for column in stage]
    rest = [one - two for one, two in zip(kept, peak, strict=True)]
    moments = []
    for place, own in enumerate(rest):
        before = (
            np.where(other < own if later > place else other <= own, kept[later], 0)
            for later, other in enumerate(rest)
            if later != place
        )
        moments.append(peak[place] + _sum(before))
    return _largest(moments)


def _quality(setting: Placement) -> int:
    return QUALITIES.index(setting.quality)


def _offloaded(setting: Placement) -> int:
    return setting != Resident()


def _sum(arrays: Iterable[Array]) -> Array:
    return reduce(_plus, arrays, _NOTHING)


def _plus(one: Array, two: Array) -> Array:
    total: Array = one + two
    return total


def _largest(arrays: Iterable[Array]) -> Array:
    """The largest, element by element; 0 of none. No figure but one of `_vram` is negative, and that never alone."""
    found = list(arrays)
    return reduce(_larger, found[1:], found[0]) if found else _NOTHING


def _larger(one: Array, two: Array) -> Array:
    larger: Array = np.maximum(one, two)
    return larger


def _over(needed: Array, usable: int | None) -> Array:
    return _NOTHING if usable is None else _larger(needed - usable, _NOTHING)


def _lowest(values: Array, kept: Array, digits: int) -> Array:
    """The places of those kept whose value, up to so many digits, is lowest."""
    found = values[kept]
    if not digits:
        same: Array = kept[found == found.min()]
        return same
    near: Array = kept[found <= found.min() * (1 + 10.0 ** (2 - digits))]  # more than one in the last digit
    every, place = np.unique(values[near], return_inverse=True)
    shorter = np.array([rounded(value, digits) for value in every.tolist()])[place]
    lowest: Array = near[shorter == shorter.min()]
    return lowest
