"""The prices of one component under every setting of an axis, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vramplan.planner.loading import Load
from vramplan.planner.order import Array
from vramplan.strategies import Placement
from vramplan.strategies.base import QUALITIES, Hold
from vramplan.strategies.resident import Resident

_RESIDENT = Resident()


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentPrice:
    """The share of one component in the price of a candidate, if no component lingers on the device.

    `load` is None for a component that is loaded already. `beside_bytes` are its weights on the device while others
    run, and `extra_bytes` are reserved at its own peak in addition to those of all, None for one that is never used;
    each outside of the denoising loop and within it. `times` are the seconds of one evaluation of the denoiser and of a
    call: at first as they are, then with one term after the other slower (`rates.slower`).
    """

    hold: Hold
    load: Load | None
    beside_bytes: tuple[int, int]
    extra_bytes: tuple[int | None, int | None]
    times: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One component over its axis. `counts` are whole numbers, a row each (see the properties), `times` the seconds per
    call, and those with one term after the other slower (`rates.slower`).

    `freed` says whether the component is freed before others are loaded, `runs` whether it runs outside of the
    denoising loop, and within it: the same for all settings of an axis.
    """

    counts: Array
    times: Array
    freed: bool
    runs: tuple[bool, bool]

    def shaped(self, shape: tuple[int, ...]) -> Column:
        """The column with this shape in place of its length, for broadcasting."""
        return replace(self, counts=self.counts.reshape(-1, *shape), times=self.times.reshape(-1, *shape))

    def beside(self, *, in_loop: bool) -> Array:
        """Weights on the device while others run."""
        return self._row(int(in_loop))

    def extra(self, *, in_loop: bool) -> Array:
        """Bytes reserved at its own peak in addition to the weights of all."""
        return self._row(2 + in_loop)

    @property
    def held(self) -> Array:
        """RAM during the call."""
        return self._row(4)

    @property
    def transient(self) -> Array:
        """RAM in addition to its weights while a plan is applied or files are read."""
        return self._row(5)

    @property
    def shared(self) -> Array:
        """RAM of buffers for copies that all components together have once."""
        return self._row(12)

    @property
    def disk(self) -> Array:
        """Bytes in files of the plan's own."""
        return self._row(6)

    @property
    def kept(self) -> Array:
        """RAM once it is loaded."""
        return self._row(7)

    @property
    def peak(self) -> Array:
        """The peak of RAM while it is loaded."""
        return self._row(8)

    @property
    def quality(self) -> Array:
        """The index of its setting's quality."""
        return self._row(9)

    @property
    def custom(self) -> Array:
        """1 for a setting that is not stock."""
        return self._row(10)

    @property
    def offloaded(self) -> Array:
        """1 for a setting other than resident."""
        return self._row(11)

    def _row(self, number: int) -> Array:
        found: Array = self.counts[number]
        return found


def make_column(settings: Sequence[Placement], prices: Sequence[ComponentPrice]) -> Column:
    """The column of these settings, priced."""
    counts = np.array([_counts(*pair) for pair in zip(settings, prices, strict=True)], np.int64)
    times = np.array([[call for _, call in price.times] for price in prices])
    first = prices[0]
    return Column(
        counts=np.ascontiguousarray(counts.T),
        times=np.ascontiguousarray(times.T),
        freed=first.hold.freed,
        runs=(first.extra_bytes[False] is not None, first.extra_bytes[True] is not None),
    )


def _counts(setting: Placement, price: ComponentPrice) -> tuple[int, ...]:
    hold, load = price.hold, price.load
    return (
        *price.beside_bytes,
        price.extra_bytes[False] or 0,
        price.extra_bytes[True] or 0,
        hold.host_bytes + hold.pinned_bytes,
        hold.host_transient_bytes if load is None or hold.disk_bytes else 0,
        hold.disk_bytes,
        load.kept_bytes if load is not None else 0,
        load.peak_bytes if load is not None else 0,
        QUALITIES.index(setting.quality),
        not setting.stock,
        setting != _RESIDENT,
        hold.shared_pinned_bytes,
    )
