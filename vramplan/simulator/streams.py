"""Weight streaming on the simulated device: its memory and its transfers, without bytes and without time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vramplan.pipeline.geometry import power_of_two
from vramplan.simulator.engine import Engine
from vramplan.simulator.ledger import Block, Ledger
from vramplan.simulator.shapes import CPU, normalize_device
from vramplan.simulator.tensor import SimTensor, make_tensor
from vramplan.streaming.division import STAGE_BYTES, STAGES


class SimulatedBackend:
    """Implements `streaming.backend.Backend`: one stream is enough where nothing takes time."""

    out_of_memory: type[Exception] = torch.OutOfMemoryError

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self.engine = engine
        self.device = normalize_device(device)
        self._stages: list[Block] = []

    @property
    def _ledger(self) -> Ledger:
        return self.engine.ledger

    def allocate(self, size: int, owner: str) -> SimTensor:
        """A buffer of weights on the device."""
        return self.engine.new(_bytes(size), self.device, "weights", owner=owner)

    def page_lock(self, size: int, owner: str) -> SimTensor:
        """A page-locked buffer, rounded up to a power of two as torch's host allocator does."""
        block = Block(self._ledger, power_of_two(size), "pinned", "weights", owner)
        return make_tensor(self.engine, _bytes(size), CPU, block)

    def view(self, buffer: SimTensor, offset: int, like: torch.Tensor) -> SimTensor:
        """A tensor in the buffer's memory. It has the value of the other one, which the copy will bring."""
        made = like if isinstance(like, SimTensor) else self.engine.from_real(like, CPU, "weights")
        return make_tensor(self.engine, made.meta, buffer.label, buffer.block, made.stored)

    def write(self, buffer: SimTensor, offset: int, tensor: torch.Tensor) -> SimTensor:
        """The same as `view`: nothing is copied."""
        return self.view(buffer, offset, tensor)

    def copy(self, buffer: SimTensor, parts: Sequence[tuple[Any, int, int, int]]) -> None:
        """Count the bytes of the parts."""
        self._ledger.count_transfer("cpu", self.device.type, sum(size for *_, size in parts))

    def gather(self, buffer: SimTensor, parts: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Count the bytes, and the page-locked buffers that they pass through."""
        if not self._stages:
            self._stages = [Block(self._ledger, STAGE_BYTES, "pinned", "weights") for _ in range(STAGES)]
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in parts)
        self._ledger.count_transfer("cpu", self.device.type, size)

    def compute_after(self, ticket: Any) -> None:
        """Do nothing: copies take no time."""

    def copy_after_compute(self) -> None:
        """Do nothing: kernels take no time."""

    def finish(self) -> None:
        """Do nothing: copies take no time."""


def _bytes(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device="meta")
