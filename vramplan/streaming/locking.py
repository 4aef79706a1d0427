"""Move the masters of blocks into page-locked memory, in a few large chunks without waste."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vramplan.pipeline.geometry import power_of_two
from vramplan.streaming.backend import Backend
from vramplan.streaming.division import CHUNK_BYTES as _CHUNK_BYTES
from vramplan.streaming.division import aligned
from vramplan.streaming.tensors import Block, is_small
from vramplan.units import format_bytes

if TYPE_CHECKING:
    import torch

_LEAST_CHUNK_BYTES = 1 << 20
# Blocks are placed together up to this many chunks, each filled as well as their tensors allow: one by one, those of
# FLUX.1 and Qwen-Image leave 4 to 5 % of the chunks free. Where the system refuses a chunk, blocks of one such window
# may be in part moved, and count as pageable.
_WINDOW_CHUNKS = 4
# Chunks are filled by sizes rounded up to this.
_UNIT_BYTES = 1 << 16
# What is smaller than this goes into the gaps that are left.
_FILLING_BYTES = 1 << 20


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
        items = _items(blocks)
        large = [item for item in items if item[2] >= _FILLING_BYTES]
        try:
            while large:
                capacity = next((free for *_, free in self._gaps if free >= large[0][2]), None)
                chosen = _fill([size for *_, size in large], capacity or _chunk_bytes(large[0][2], self.left))
                for block, numbers, _ in (large[place] for place in chosen):
                    places[block] |= self._lock_together(block, numbers)
                large = [item for place, item in enumerate(large) if place not in chosen]
            for block, numbers, _ in (item for item in items if item[2] < _FILLING_BYTES):
                places[block] |= self._lock_together(block, numbers)
        finally:
            for block in blocks:
                if len(places[block]) == len(block.offsets):
                    block.set_locked([places[block][number] for number in range(len(block.offsets))])

    def _lock_together(self, block: Block, numbers: Sequence[int]) -> dict[int, tuple[Any, int]]:
        """Move tensors side by side, in the order that they have in the block's buffer: one copy brings them."""
        places = {number: self.known.get(block.tensors[number].data_ptr()) for number in numbers}
        new = [number for number, there in places.items() if there is None]
        sizes = [_bytes_of(block.tensors[number]) for number in new]
        chunk, start = self._place(sum(sizes)) if new else (None, 0)
        for number, size in zip(new, sizes, strict=True):
            block.replace_master(number, self.backend.write(chunk, start, block.tensors[number]))
            places[number] = chunk, start
            start += size
            self.left -= size
        return {number: there for number, there in places.items() if there is not None}

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
    locker = Locker(backend, owner, known, sum(_bytes_of(tensor) for tensor in new))
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


def _items(blocks: Sequence[Block]) -> list[tuple[Block, list[int], int]]:
    """The numbers of the tensors of blocks and their bytes, largest first: each large one for itself, the small ones of
    a block together."""
    found: list[tuple[Block, list[int], int]] = []
    for block in blocks:
        sizes = [_bytes_of(tensor) for tensor in block.tensors]
        small = [number for number, tensor in enumerate(block.tensors) if is_small(tensor)]
        found += [(block, [number], sizes[number]) for number in range(len(sizes)) if number not in set(small)]
        if small:
            found.append((block, small, sum(sizes[number] for number in small)))
    return sorted(found, key=lambda item: -item[2])


def _bytes_of(tensor: torch.Tensor) -> int:
    return aligned(tensor.numel() * tensor.element_size())


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
