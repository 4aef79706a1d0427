"""The division of a component into blocks that are kept, cached and streamed, and sizes that its price rests on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

# Blocks smaller than this share of the largest are never streamed: waiting for one costs more than its memory is worth.
_WORTH_STREAMING = 0.25
# Offsets within a buffer are multiples of this, as those of torch's own allocations: kernels choose by alignment, and
# another kernel may round differently (torch 2.13, `kMinBlockSize` of CUDACachingAllocator).
_ALIGNMENT = 512
# Streamed blocks share this many slots on the device: one runs while the next is copied.
SLOTS = 2
# Page-locked chunks are powers of two, as torch's host allocator rounds up to these, and at most this large: while a
# component is moved into them, one chunk more than its weights is needed.
CHUNK_BYTES = 1 << 30
# Copies from pageable memory and files pass through this many page-locked buffers of this size: large enough for the
# full rate of a link, small enough to be forgotten. Assumed.
STAGES, STAGE_BYTES = 4, 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Indices of blocks: `kept` are on the device throughout, `cached` while their component's phase lasts, `streamed`
    only while they run."""

    kept: tuple[int, ...]
    cached: tuple[int, ...]
    streamed: tuple[int, ...]

    @property
    def by_need(self) -> tuple[int, ...]:
        """Indices of blocks that are copied in, those first that are copied most often."""
        return (*self.streamed, *self.cached)


def divide(sizes: Sequence[int], *, streamed: int, keep: int) -> Division:
    """Divide blocks of these sizes in bytes: `streamed` of them are spread evenly, the first `keep` others are kept.

    Raises:
        ValueError: there are fewer blocks worth streaming, or fewer to keep.
    """
    chosen = spread_evenly(sizes, streamed)
    taken = set(chosen)
    others = [place for place in range(len(sizes)) if place not in taken]
    if keep > len(others):
        raise ValueError(f"{keep} blocks to keep, but {len(others)} are not streamed")
    return Division(kept=tuple(others[:keep]), cached=tuple(others[keep:]), streamed=tuple(chosen))


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Running totals in bytes of a component's streamed blocks and of the others, in the order they are copied and
    kept in, each from 0 on; and the bytes of all slots. Every number of kept and page-locked blocks is priced by them
    (`divide` lists the blocks themselves)."""

    streamed: tuple[int, ...]
    others: tuple[int, ...]
    slots: int

    def locked(self, count: int, keep: int) -> tuple[int, int]:
        """The bytes of the first `count` blocks by need: of the streamed and of the cached ones."""
        cached = max(0, count - len(self.streamed) + 1)
        last = min(keep + cached, len(self.others) - 1)
        return self.streamed[min(count, len(self.streamed) - 1)], self.others[last] - self.others[keep]

    def lockable(self, level: int, keep: int) -> int:
        """How many blocks by need fit into so many bytes."""
        if level < self.streamed[-1]:
            return max(0, bisect_right(self.streamed, level) - 1)
        left = level - self.streamed[-1] + self.others[keep]
        return len(self.streamed) - 1 + bisect_right(self.others, left) - 1 - keep


@lru_cache(maxsize=4096)
def totals(sizes: tuple[int, ...], streamed: int) -> Totals:
    """The running totals with so many streamed blocks.

    Raises:
        ValueError: fewer blocks are worth streaming.
    """
    division = divide(sizes, streamed=streamed, keep=0)
    return Totals(
        streamed=tuple(accumulate((sizes[place] for place in division.streamed), initial=0)),
        others=tuple(accumulate((sizes[place] for place in division.cached), initial=0)),
        slots=slot_bytes(sizes, division.streamed),
    )


def spread_evenly(sizes: Sequence[int], count: int) -> list[int]:
    """Return the indices of `count` blocks of these sizes, spread evenly, with a gap before the first.

    Raises:
        ValueError: fewer blocks are worth streaming.
    """
    worth = worth_streaming(sizes)
    if count > len(worth):
        raise ValueError(f"{count} blocks to stream, but there are {len(worth)}")
    return [worth[(number + 1) * len(worth) // count - 1] for number in range(count)]


def worth_streaming(sizes: Sequence[int]) -> list[int]:
    """Return the indices of blocks that may be streamed."""
    least = max(sizes, default=0) * _WORTH_STREAMING
    return [place for place, size in enumerate(sizes) if size >= least and size]


def slot_bytes(sizes: Sequence[int], chosen: Sequence[int]) -> int:
    """Return the bytes of all slots: each holds the largest streamed block."""
    return min(SLOTS, len(chosen)) * max((sizes[place] for place in chosen), default=0)


def aligned(size: int) -> int:
    """The size in bytes, rounded up to a whole number of alignments."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
