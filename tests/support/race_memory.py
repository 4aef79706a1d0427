"""The memory of the race-finding device, which knows who has accessed each piece of it, and when."""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import torch

GRANULE = 512
GARBAGE = 0xFF  # a NaN in every floating-point type


class Zone:
    """A range of memory with an allocator, and the time of the last access to each granule by each actor."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.bytes = np.empty(size, np.uint8)
        self.start = self.bytes.ctypes.data
        self.size = size
        self.last_read = np.zeros((4, size // GRANULE), np.int32)
        self.last_write = np.zeros((4, size // GRANULE), np.int32)
        self.free = [(0, size)]
        self.freed: deque[tuple[int, int]] = deque()
        self.used = 0
        self.peak = 0

    def allocate(self, size: int) -> torch.Tensor:
        """Memory that was freed last, if it is large enough."""
        length = max(1, -(-size // GRANULE)) * GRANULE
        place = next(place for place in reversed(range(len(self.free))) if self.free[place][1] >= length)
        start, free = self.free.pop(place)
        if free > length:
            self.free.insert(0 if free > self.size // 2 else place, (start + length, free - length))
        piece = self.bytes[start : start + size]
        self.bytes[start : start + length] = GARBAGE
        self.used += length
        self.peak = max(self.peak, self.used)
        weakref.finalize(piece, self.freed.append, (start, length))
        return torch.from_numpy(piece)

    def part(self, tensor: torch.Tensor) -> slice | None:
        """The granules of a tensor, None if it lies elsewhere."""
        start = tensor.data_ptr() - self.start
        if not 0 <= start < self.size or not tensor.numel():
            return None
        last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
        end = start + (last + 1) * tensor.element_size()
        return slice(start // GRANULE, -(-end // GRANULE))
