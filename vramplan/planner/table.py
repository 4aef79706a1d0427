"""Price all candidates of a pool at once, as arrays over all of them.

If no component lingers on the device, each adds its share to a candidate's price independently of the others
(`Pricer.component_prices`): sums and maxima over axes equal the prices of `Pricer`, thousands of times faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from vramplan.hardware.types import Budget
from vramplan.planner.demand import ComponentPrice, Pricer
from vramplan.planner.loading import Load
from vramplan.planner.order import Array, Prefer, first
from vramplan.planner.pool import CandidatePool
from vramplan.strategies import Decode, Placement
from vramplan.strategies.base import QUALITIES
from vramplan.strategies.resident import Resident

_ZERO: Array = np.zeros((), int)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """One component over its axis: setting and price at each index, and the shape of the arrays for broadcasting."""

    settings: Sequence[Placement]
    prices: Sequence[ComponentPrice]
    shape: tuple[int, ...]

    @property
    def freed(self) -> bool:
        """Whether the component is freed before others are loaded; the same at each index of a pool."""
        return self.prices[0].hold.freed

    def of_prices(self, value: Callable[[ComponentPrice], float]) -> Array:
        """A value of each price."""
        return self._shaped([value(price) for price in self.prices])

    def of_loads(self, value: Callable[[Load], int]) -> Array:
        """A value of each loading."""
        return self._shaped([value(price.load) for price in self.prices if price.load is not None])

    def of_settings(self, value: Callable[[Placement], int]) -> Array:
        """A value of each setting."""
        return self._shaped([value(setting) for setting in self.settings])

    def _shaped(self, values: Sequence[float]) -> Array:
        return np.array(values).reshape(self.shape)


class Table:
    """The prices of all candidates of a pool, in bytes and seconds.

    RAM and disk are the same for every decode. `decode` is one that is priced anyway: another might need a simulation.
    """

    def __init__(self, pool: CandidatePool, pricer: Pricer, decode: tuple[Decode, ...]) -> None:
        self.pool = pool
        self.pricer = pricer
        self.lengths = tuple(map(len, pool.axes))
        columns = self._columns(decode)
        self.ram = self._whole(_ram(_stages(columns), loaded=pricer.loaded))
        self.disk = self._whole(_sum(column.of_prices(lambda price: price.hold.disk_bytes) for column in columns))
        self.quality = self._whole(_largest(column.of_settings(_quality) for column in columns))
        self.custom = self._whole(_sum(column.of_settings(_custom) for column in columns))
        self.offloaded = self._whole(_sum(column.of_settings(_offloaded) for column in columns))
        self._by_decode: dict[tuple[Decode, ...], tuple[Array, Array]] = {}
        self._slower: dict[tuple[Decode, ...], list[Array]] = {}

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
        found = self._slower.get(decode)
        if found is None:
            columns = self._columns(decode)
            terms = range(len(self.pricer.slower))
            found = self._slower[decode] = [self._whole(_if_slower(columns, term)) for term in terms]
        return found

    def vram_and_seconds(self, decode: tuple[Decode, ...]) -> tuple[Array, Array]:
        """Return the reserved device memory in bytes, and the seconds per call."""
        found = self._by_decode.get(decode)
        if found is None:
            columns = self._columns(decode)
            vram = _largest(map(_vram, _stages(columns))) + self.pricer.workspace_bytes
            seconds = _sum(column.of_prices(lambda price: price.seconds) for column in columns)
            found = self._by_decode[decode] = self._whole(vram), self._whole(seconds)
        return found

    def _columns(self, decode: tuple[Decode, ...]) -> list[_Column]:
        found = []
        for place, axis in enumerate(self.pool.axes):
            shape = tuple(len(axis) if other == place else 1 for other in range(len(self.pool.axes)))
            for name in axis[0]:
                settings = [placed[name] for placed in axis]
                prices = self.pricer.component_prices(name, settings, decode)
                found.append(_Column(settings=settings, prices=prices, shape=shape))
        return found

    def _whole(self, values: Array) -> Array:
        return np.ascontiguousarray(np.broadcast_to(values, self.lengths)).ravel()


def _stages(columns: Sequence[_Column]) -> list[list[_Column]]:
    """Split columns into components that are freed before others are loaded, and the others."""
    return [[column for column in columns if column.freed is freed] for freed in (True, False)]


def _vram(stage: Sequence[_Column]) -> Array:
    """Return the reserved memory while these run, outside of the denoising loop and within it: the weights of all that
    are there anyway, and the largest extra of one component."""
    return _largest(_vram_of(stage, in_loop=in_loop) for in_loop in (False, True))


def _vram_of(stage: Sequence[_Column], *, in_loop: bool) -> Array:
    used = [column for column in stage if column.prices[0].extra_bytes[in_loop] is not None]
    if not used:
        return _ZERO
    beside = _sum(column.of_prices(lambda price: price.beside_bytes[in_loop]) for column in stage)
    return beside + _largest(column.of_prices(lambda price: price.extra_bytes[in_loop] or 0) for column in used)


def _ram(stages: Sequence[Sequence[_Column]], *, loaded: bool) -> Array:
    """Return the RAM at the highest of three times: encoding first, the rest of the call, and loading."""
    held = _largest(
        _sum(column.of_prices(lambda price: price.hold.host_bytes + price.hold.pinned_bytes) for column in stage)
        for stage in stages
    )
    running = held + _largest(
        column.of_prices(lambda price: _transient(price, loaded)) for stage in stages for column in stage
    )
    return running if loaded else _largest([running, *map(_loading, stages)])


def _if_slower(columns: Sequence[_Column], term: int) -> Array:
    """Return the seconds per call with this term slower."""
    return _sum(column.of_prices(lambda price: price.if_slower[term]) for column in columns)


def _transient(price: ComponentPrice, loaded: bool) -> int:
    """Return the RAM a component needs in addition to its weights while a plan is applied or files are read."""
    return price.hold.host_transient_bytes if loaded or price.hold.disk_bytes else 0


def _loading(stage: Sequence[_Column]) -> Array:
    """Return the peak of loading these in turn, those first that give back most (`load_order`)."""
    kept = [column.of_loads(lambda load: load.kept_bytes) for column in stage]
    peak = [column.of_loads(lambda load: load.peak_bytes) for column in stage]
    rest = [one - two for one, two in zip(kept, peak, strict=True)]
    totals = []
    for place, own in enumerate(rest):
        before = (
            np.where(other < own if later > place else other <= own, kept[later], 0)
            for later, other in enumerate(rest)
            if later != place
        )
        totals.append(peak[place] + _sum(before))
    return _largest(totals)


def _quality(setting: Placement) -> int:
    return QUALITIES.index(setting.quality)


def _custom(setting: Placement) -> int:
    return not setting.stock


def _offloaded(setting: Placement) -> int:
    return setting != Resident()


def _sum(arrays: Iterable[Array]) -> Array:
    return reduce(np.add, arrays, _ZERO)


def _largest(arrays: Iterable[Array]) -> Array:
    """Return the element-wise maximum; 0 without arrays."""
    found = list(arrays)
    return reduce(np.maximum, found) if found else _ZERO


def _excess(needed: Array, usable: int | None) -> Array:
    return _ZERO if usable is None else _largest([needed - usable, _ZERO])
