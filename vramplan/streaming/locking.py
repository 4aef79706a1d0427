"""Move the masters of blocks into page-locked memory, in a few large chunks without waste."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from vramplan.pipeline.geometry import power_of_two
from vramplan.streaming.backend import Backend
from vramplan.streaming.division import CHUNK_BYTES as _CHUNK_BYTES
from vramplan.streaming.division import aligned
from vramplan.streaming.tensors import SMALL_BYTES, Block
from vramplan.units import format_bytes

_LEAST_CHUNK_BYTES = 1 << 20
# Blocks are placed together up to this many chunks, each filled as well as their tensors allow: one by one, those of
# FLUX.1 and Qwen-Image leave 4 to 5 % of the chunks free. Where the system refuses a chunk, blocks of one such window
# may be in part moved, and count as pageable.
_WINDOW_CHUNKS = 4
# Chunks are filled by sizes rounded up to this.
_UNIT_BYTES = 1 << 16


class Locker:
    """Chunks for the masters of one component. `left` bytes are still to be placed."""

    def __init__(self, backend: Backend, owner: str, known: Mapping[int, tuple[Any, int]], left: int) -> None:
        self.backend = backend
        self.owner = owner
        self.known = known
        self.left = left
        self._gaps: list[tuple[Any, int, int]] = []  # chunk, first free byte, free bytes

    def lock(self, blocks: Sequence[Block]) -> None:
        """Move the masters of these blocks.

        Raises:
            RuntimeError: the system refuses a chunk. Blocks whose masters are not all in one are copied from where
                they are.
        """
        places: dict[Block, dict[int, tuple[Any, int]]] = {block: {} for block in blocks}
        large, small = _by_size(blocks)
        try:
            while large:
                size = aligned(large[0][2])
                capacity = next((free for *_, free in self._gaps if free >= size), _chunk_bytes(size, self.left))
                chosen = _fill([aligned(item[2]) for item in large], capacity)
                for block, number, _ in (large[place] for place in chosen):
                    places[block][number] = self._lock_tensor(block, number)
                large = [item for place, item in enumerate(large) if place not in chosen]
            for block, number, _ in small:
                places[block][number] = self._lock_tensor(block, number)
        finally:
            for block in blocks:
                if len(places[block]) == len(block.offsets):
                    block.set_locked([places[block][number] for number in range(len(block.offsets))])

    def _lock_tensor(self, block: Block, number: int) -> tuple[Any, int]:
        tensor = block.tensors[number]
        there = self.known.get(tensor.data_ptr())
        if there is None:
            size = aligned(tensor.numel() * tensor.element_size())
            there = self._place(size)
            block.replace_master(number, self.backend.write(*there, tensor))
            self.left -= size
        return there

    def _place(self, size: int) -> tuple[Any, int]:
        number = next((number for number, gap in enumerate(self._gaps) if gap[2] >= size), len(self._gaps))
        if number == len(self._gaps):
            chunk_bytes = _chunk_bytes(size, self.left)
            self._gaps.append((self.backend.page_lock(chunk_bytes, self.owner), 0, chunk_bytes))
        chunk, start, free = self._gaps[number]
        self._gaps[number] = (chunk, start + size, free - size)
        return chunk, start


def page_lock(
    backend: Backend,
    blocks: Iterable[Block],
    owner: str,
    known: Mapping[int, tuple[Any, int]] = MappingProxyType({}),
) -> str | None:
    """Move masters into page-locked chunks. Those at `known` addresses are there already, in this chunk and at this
    offset. Where the system refuses, the rest stay as they are: return a note that says so."""
    waiting = [block for block in blocks if block.size]
    new = [tensor for block in waiting for tensor in block.tensors if tensor.data_ptr() not in known]
    locker = Locker(backend, owner, known, sum(aligned(tensor.numel() * tensor.element_size()) for tensor in new))
    try:
        for window in _windows(waiting):
            locker.lock(window)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        return f"{owner}: {format_bytes(locker.left)} could not be page-locked ({reason}): copied more slowly"
    return None


def _windows(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    window: list[Block] = []
    for block in blocks:
        window.append(block)
        if sum(item.size for item in window) >= _WINDOW_CHUNKS * _CHUNK_BYTES:
            yield window
            window = []
    if window:
        yield window


def _by_size(blocks: Sequence[Block]) -> tuple[list[tuple[Block, int, int]], list[tuple[Block, int, int]]]:
    """The tensors of blocks with their number and bytes: large ones, largest first, and small ones in their order,
    which are copied in one piece."""
    found = [
        (block, number, tensor.numel() * tensor.element_size())
        for block in blocks
        for number, tensor in enumerate(block.tensors)
    ]
    large = sorted((item for item in found if item[2] >= SMALL_BYTES), key=lambda item: -item[2])
    return large, [item for item in found if item[2] < SMALL_BYTES]


def _fill(sizes: Sequence[int], capacity: int) -> set[int]:
    """The places of sizes, the first among them, whose sum comes nearest to the capacity from below."""
    units = [-(-size // _UNIT_BYTES) for size in sizes]
    left = capacity // _UNIT_BYTES - units[0]
    if left <= 0:
        return {0}
    mask = (1 << (left + 1)) - 1
    reached = [1]  # bit n: the sizes so far have a subset with the sum n
    for unit in units[1:]:
        reached.append((reached[-1] | reached[-1] << unit) & mask)
    rest, chosen = reached[-1].bit_length() - 1, {0}
    for place in range(len(units) - 1, 0, -1):
        if not reached[place - 1] >> rest & 1:
            chosen.add(place)
            rest -= units[place]
    return chosen


def _chunk_bytes(size: int, left: int) -> int:
    """The bytes of the next chunk: a power of two that holds the tensor, near what is left to place."""
    wanted = max(size, min(_CHUNK_BYTES, 1 << (left.bit_length() - 1)), _LEAST_CHUNK_BYTES)
    return power_of_two(wanted)
