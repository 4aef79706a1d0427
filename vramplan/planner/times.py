"""The cost model of time: a term a function, each in seconds. Its constants are in `hardware.rates`."""

from __future__ import annotations

from collections.abc import Collection
from math import exp, hypot, log

import numpy as np

from vramplan.hardware.rates import Rates
from vramplan.planner.footprint import Work
from vramplan.strategies.base import Hold


def products(work: Work, rates: Rates) -> float:
    """Products, attention and convolutions, each kind and dtype at its own rate."""
    return sum(flops / rates.flops_per_s(kind) for kind, flops in work.flops.items())


def traffic(work: Work, rates: Rates) -> float:
    """Kernels without products: what they read and write, at the memory's rate."""
    return work.traffic_bytes / (rates.memory_bytes_per_s * rates.memory_share)


def launches(work: Work, rates: Rates) -> float:
    """Python and the driver launching kernels, which the device waits for where kernels are small."""
    return work.launches * rates.launch_seconds


def copies_in(hold: Hold, size: int, rates: Rates) -> float:
    """Weights copied to the device: from pageable memory, or from pinned memory at the link's rate or a stream's."""
    if hold.pageable:
        return size / rates.from_pageable_bytes_per_s
    share = rates.flat_share if hold.flat else rates.stream_share if hold.overlapped else 1.0
    return size / (rates.link_bytes_per_s * hold.rate * share)


def copies_back(hold: Hold, size: int, rates: Rates) -> float:
    """Weights copied back to freshly allocated pageable memory. Pinned copies are merely pointed to again."""
    return size / rates.back_bytes_per_s if hold.pageable else 0.0


def copies_around(size: float, rates: Rates) -> float:
    """Weights outside of streamed groups: from pageable memory and back, half of `size` each."""
    return size / 2 / rates.from_pageable_bytes_per_s + size / 2 / rates.back_bytes_per_s


def gathered(hold: Hold, size: int, rates: Rates) -> float:
    """Streamed weights that are not page-locked, from the model's files or from pageable memory."""
    return file_reads(size, rates) if hold.from_file else size / rates.from_pageable_bytes_per_s


def entering(hold: Hold, rates: Rates) -> float:
    """The weights that stay while a component's phase lasts, copied when it begins."""
    return copies_in(hold, hold.entry_bytes, rates) + gathered(hold, hold.entry_gathered_bytes, rates)


def file_reads(size: int, rates: Rates) -> float:
    """Weights read from files."""
    return size / rates.disk_bytes_per_s


def moving(hold: Hold, forwards: float, rates: Rates) -> float:
    """The weights that a component moves on each of its forwards."""
    each = file_reads(hold.disk_bytes, rates) + copies_in(hold, hold.moved_in_bytes, rates)
    each += gathered(hold, hold.gathered_bytes, rates)
    return forwards * (each + copies_back(hold, hold.moved_out_bytes, rates) + copies_around(hold.waited_bytes, rates))


def hooks(hold: Hold, forwards: float, rates: Rates) -> float:
    """Waiting for transfers to end, and the hooks of leaves that accelerate puts on."""
    return forwards * (hold.pauses * rates.pause_seconds + hold.leaf_hooks * rates.leaf_seconds)


def together(busy: float, moved: float, hold: Hold) -> float:
    """Computing and moving weights: one after the other, or the shorter behind the longer but for a share of it."""
    if not hold.overlapped:
        return busy + moved
    if isinstance(moved, np.ndarray):  # of many settings
        longer: float = np.maximum(busy, moved) + hold.unhidden * np.minimum(busy, moved)
        return longer
    return max(busy, moved) + hold.unhidden * min(busy, moved)


def seconds_range(seconds: float, if_slower: Collection[float]) -> tuple[float, float] | None:
    """The shortest and the longest that a time may be, with terms that are off independently of each other; None
    where how far they may be off is not known."""
    if not if_slower or seconds <= 0:
        return None
    width = exp(hypot(*(log(longer / seconds) for longer in if_slower)))
    return seconds / width, seconds * width
