"""A model of PyTorch's CUDA caching allocator: the bytes it reserves for the bytes allocated.

The rules are those of c10/cuda/CUDACachingAllocator.cpp (torch 2.13) with its default settings: requests are
rounded to 512 bytes; up to 1 MiB they come from the small pool, cut from segments of 2 MiB; larger ones from
the large pool, cut from segments of 20 MiB, or of their own size rounded to 2 MiB from 10 MiB on. A block is
split when the remainder is worth keeping, merged with free neighbours when it is freed, and belongs to the
stream it was allocated on. When the device is full, cached segments that are entirely free are released and the
request is retried; if that fails too, the device is out of memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from vramplan.units import MIB

ROUND = 512
SMALL_REQUEST = 1 * MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
LARGE_REQUEST = 10 * MIB
LARGE_ROUND = 2 * MIB


class DeviceFullError(Exception):
    """The request does not fit next to the allocated memory, even with every cached segment released."""

    def __init__(self, requested_bytes: int, allocated_bytes: int, reserved_bytes: int, capacity_bytes: int) -> None:
        super().__init__(requested_bytes, allocated_bytes, reserved_bytes, capacity_bytes)
        self.requested_bytes = requested_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.capacity_bytes = capacity_bytes


@dataclass(slots=True, eq=False)
class Chunk:
    """A piece of a segment. `before` and `after` are its neighbours in the segment."""

    address: int
    size: int
    pool: ChunkPool
    used: bool = False
    before: Chunk | None = None
    after: Chunk | None = None


@dataclass(slots=True, eq=False)
class ChunkPool:
    """The free chunks of one kind and stream, sorted by size, then address, for the best-fit search."""

    small: bool
    free: list[tuple[int, int]] = field(default_factory=list)
    chunks: dict[int, Chunk] = field(default_factory=dict)

    def add(self, chunk: Chunk) -> None:
        """Add a free chunk, to be reused."""
        insort(self.free, (chunk.size, chunk.address))
        self.chunks[chunk.address] = chunk

    def remove(self, chunk: Chunk) -> None:
        """Remove a chunk that is about to be used, merged or released."""
        del self.free[bisect_left(self.free, (chunk.size, chunk.address))]
        del self.chunks[chunk.address]

    def best_fit(self, size: int) -> Chunk | None:
        """The smallest free chunk that holds `size` bytes, else None."""
        place = bisect_left(self.free, (size, 0))
        return self.chunks[self.free[place][1]] if place < len(self.free) else None


class CachingAllocator:
    """Allocated and reserved bytes of one device, now and at their peaks.

    `capacity_bytes` limits the reserved bytes; None is unlimited. With `expandable`, segments grow in place, so that
    fragmentation costs only the rounding to 2 MiB (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True).
    """

    def __init__(self, *, capacity_bytes: int | None = None, expandable: bool = False) -> None:
        self.capacity_bytes = capacity_bytes
        self.expandable = expandable
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.peak_reserved_bytes = 0
        self.retries = 0
        self._pools: dict[tuple[int, bool], ChunkPool] = {}
        self._next_address = 0

    def allocate(self, size: int, stream: int = 0) -> Chunk:
        """Allocate a chunk of `size` bytes on a stream.

        Raises:
            DeviceFullError: it does not fit under the capacity.
        """
        rounded = max(ROUND, -(-size // ROUND) * ROUND)
        small = rounded <= SMALL_REQUEST
        pool = self._pools.setdefault((stream, small), ChunkPool(small=small))
        chunk = pool.best_fit(rounded)
        if chunk is None:
            chunk = self._new_segment(rounded, pool)
        else:
            pool.remove(chunk)
        self._split(chunk, rounded)
        chunk.used = True
        self.allocated_bytes += chunk.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return chunk

    def free(self, chunk: Chunk) -> None:
        """Return a chunk to its pool, merged with its free neighbours."""
        chunk.used = False
        self.allocated_bytes -= chunk.size
        pool = chunk.pool
        before, after = chunk.before, chunk.after
        if before is not None and not before.used:
            pool.remove(before)
            before.size += chunk.size
            before.after = after
            if after is not None:
                after.before = before
            chunk = before
        if after is not None and not after.used:
            pool.remove(after)
            chunk.size += after.size
            chunk.after = after.after
            if after.after is not None:
                after.after.before = chunk
        pool.add(chunk)

    def empty_cache(self) -> None:
        """Release every segment that is entirely free (`torch.cuda.empty_cache`)."""
        for pool in self._pools.values():
            for chunk in [item for item in pool.chunks.values() if item.before is None and item.after is None]:
                pool.remove(chunk)
                self.reserved_bytes -= chunk.size
        if self.expandable:
            self._release_pages()

    def _new_segment(self, rounded: int, pool: ChunkPool) -> Chunk:
        size = self._segment_size(rounded, small=pool.small)
        if self._exceeds_capacity(size):
            self.retries += 1
            self.empty_cache()
        if self._exceeds_capacity(size):
            assert self.capacity_bytes is not None
            raise DeviceFullError(rounded, self.allocated_bytes, self.reserved_bytes, self.capacity_bytes)
        self.reserved_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        # A gap between segments: chunks of different segments are never adjacent in address.
        self._next_address += size + ROUND
        return Chunk(address=self._next_address - size - ROUND, size=size, pool=pool)

    def _segment_size(self, rounded: int, *, small: bool) -> int:
        if small:
            return SMALL_SEGMENT
        if rounded < LARGE_REQUEST and not self.expandable:
            return LARGE_SEGMENT
        return -(-rounded // LARGE_ROUND) * LARGE_ROUND

    def _split(self, chunk: Chunk, rounded: int) -> None:
        """Split off the remainder: from 512 bytes in the small pool, above 1 MiB in the large one."""
        left = chunk.size - rounded
        if left < ROUND if chunk.pool.small else left <= (0 if self.expandable else SMALL_REQUEST):
            return
        rest = Chunk(address=chunk.address + rounded, size=left, pool=chunk.pool, before=chunk, after=chunk.after)
        if chunk.after is not None:
            chunk.after.before = rest
        chunk.after = rest
        chunk.size = rounded
        chunk.pool.add(rest)

    def _exceeds_capacity(self, size: int) -> bool:
        return self.capacity_bytes is not None and self.reserved_bytes + size > self.capacity_bytes

    def _release_pages(self) -> None:
        """Release whole free pages of 2 MiB at the end of expandable segments."""
        for pool in self._pools.values():
            for chunk in list(pool.chunks.values()):
                pages = chunk.size // LARGE_ROUND * LARGE_ROUND
                if pages and chunk.after is None and chunk.before is not None:
                    pool.remove(chunk)
                    self.reserved_bytes -= pages
                    chunk.size -= pages
                    if chunk.size:
                        pool.add(chunk)
                    else:
                        chunk.before.after = None
