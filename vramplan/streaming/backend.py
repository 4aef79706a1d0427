"""Memory, streams and events of a device, as far as weight streaming needs them."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from vramplan.streaming.division import STAGE_BYTES, STAGES
from vramplan.streaming.tensors import is_dense


class Backend(Protocol):
    """Copies weights to a device on a stream of its own, ordered against the compute stream by events.

    A ticket stands for copies that were asked for: `compute_after(ticket)` makes the compute stream wait for them, and
    may wait itself until they are enqueued, never until they are done. A full device raises `out_of_memory`.
    """

    @property
    def out_of_memory(self) -> type[Exception]:
        """The error of a full device."""

    def allocate(self, size: int, owner: str) -> Any:
        """A buffer of so many bytes on the device, which copies may fill once earlier kernels are done with its memory.

        Raises:
            torch.OutOfMemoryError: the device is full.
        """

    def page_lock(self, size: int, owner: str) -> Any:
        """A page-locked buffer of so many bytes. Raises RuntimeError if the system refuses."""

    def view(self, buffer: Any, offset: int, like: torch.Tensor) -> torch.Tensor:
        """A tensor with shape, strides and dtype of another one, from this byte of a buffer on."""

    def write(self, buffer: Any, offset: int, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor into a page-locked buffer and return the copy."""

    def copy(self, buffer: Any, parts: Sequence[tuple[Any, int, int, int]]) -> Any:
        """Copy parts of page-locked buffers (buffer, offset there, offset here, bytes) into a buffer on the device.
        Returns a ticket."""

    def gather(self, buffer: Any, parts: Sequence[tuple[int, torch.Tensor]]) -> Any:
        """Copy tensors in pageable memory or mapped files to their offsets in a buffer on the device; returns a
        ticket."""

    def compute_after(self, ticket: Any) -> None:
        """Later kernels run after the copies of the ticket."""

    def copy_after_compute(self) -> None:
        """Later copies run after the kernels launched so far."""

    def finish(self) -> None:
        """Wait until all copies are done."""


class TorchBackend:
    """A device with streams: CUDA, ROCm or XPU, by torch's own streams and events for any accelerator."""

    out_of_memory: type[Exception] = torch.OutOfMemoryError

    def __init__(self, device: torch.device) -> None:
        self._side = torch.Stream(device)
        self.device = self._side.device  # with its index: threads have current devices of their own
        self._copier: ThreadPoolExecutor | None = None
        self._copier_side = another_handle(self._side)
        self._stages: list[tuple[torch.Tensor, torch.Event]] = []
        self._can_lock = True

    def allocate(self, size: int, owner: str) -> torch.Tensor:
        """A buffer on the device, ordinary also in inference mode, where torch would refuse it as data of a weight."""
        with torch.inference_mode(False):
            made = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.copy_after_compute()
        return made

    def page_lock(self, size: int, owner: str) -> torch.Tensor:
        """A page-locked buffer of torch's host allocator, which takes powers of two without waste."""
        with torch.inference_mode(False):
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def view(self, buffer: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
        """A view of the buffer; contiguous if the other tensor has gaps."""
        with torch.inference_mode(False):
            return view_of(buffer, offset, like)

    def write(self, buffer: torch.Tensor, offset: int, tensor: torch.Tensor) -> torch.Tensor:
        """Copy on the host."""
        with torch.inference_mode(False), torch.no_grad():
            return view_of(buffer, offset, tensor).copy_(tensor)

    def copy(self, buffer: torch.Tensor, parts: Sequence[tuple[Any, int, int, int]]) -> Any:
        """Enqueue one copy for each part on the side stream."""
        with self._side, torch.inference_mode(False), torch.no_grad():
            for source, there, here, size in parts:
                buffer[here : here + size].copy_(source[there : there + size], non_blocking=True)
        return self._side.record_event()

    def gather(self, buffer: torch.Tensor, parts: Sequence[tuple[int, torch.Tensor]]) -> Any:
        """Let a thread copy through page-locked buffers, so that reading a file does not delay launches."""
        if self._copier is None:
            self._copier = ThreadPoolExecutor(1, thread_name_prefix="vramplan-copier")
        return self._copier.submit(self._gather, buffer, list(parts))

    def _gather(self, buffer: torch.Tensor, parts: Sequence[tuple[int, torch.Tensor]]) -> torch.Event:
        with torch.inference_mode(False), torch.no_grad():
            for _, tensor in parts:
                read_ahead(tensor)
            for offset, tensor in parts:
                data = flat_bytes(tensor)
                for start in range(0, data.numel(), STAGE_BYTES):
                    piece = data[start : start + STAGE_BYTES]
                    self._through_stage(buffer[offset + start : offset + start + piece.numel()], piece)
        return self._copier_side.record_event()

    def _through_stage(self, target: torch.Tensor, piece: torch.Tensor) -> None:
        stage = self._free_stage()
        if stage is None:  # waits for the device, and is slower
            with self._copier_side:
                target.copy_(piece)
            return
        stage[: piece.numel()].copy_(piece)
        with self._copier_side:
            target.copy_(stage[: piece.numel()], non_blocking=True)
        self._stages.append((stage, self._copier_side.record_event()))

    def _free_stage(self) -> torch.Tensor | None:
        """A page-locked buffer that no copy reads; None if the system refuses every one."""
        if self._can_lock and len(self._stages) < STAGES:
            try:
                return torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:
                self._can_lock = False
        if not self._stages:
            return None
        stage, used = self._stages.pop(0)
        used.synchronize()
        return stage

    def compute_after(self, ticket: Any) -> None:
        """Let the current stream wait for the ticket's event."""
        event = ticket.result() if isinstance(ticket, Future) else ticket
        torch.accelerator.current_stream(self.device).wait_event(event)

    def copy_after_compute(self) -> None:
        """Let the side stream wait for an event on the current stream."""
        self._side.wait_event(torch.accelerator.current_stream(self.device).record_event())

    def finish(self) -> None:
        """Wait for the thread and the side stream."""
        if self._copier is not None:
            self._copier.submit(lambda: None).result()
        self._side.synchronize()


class DirectBackend:
    """A device without streams, such as the CPU: every copy is done when it is asked for."""

    out_of_memory: type[Exception] = torch.OutOfMemoryError

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocate(self, size: int, owner: str) -> torch.Tensor:
        """A buffer on the device."""
        with torch.inference_mode(False):
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def page_lock(self, size: int, owner: str) -> torch.Tensor:
        """A buffer in RAM, which cannot be page-locked without an accelerator."""
        with torch.inference_mode(False):
            return torch.empty(size, dtype=torch.uint8)

    view = TorchBackend.view
    write = TorchBackend.write

    def copy(self, buffer: torch.Tensor, parts: Sequence[tuple[Any, int, int, int]]) -> None:
        """Copy at once."""
        with torch.inference_mode(False), torch.no_grad():
            for source, there, here, size in parts:
                buffer[here : here + size].copy_(source[there : there + size])

    def gather(self, buffer: torch.Tensor, parts: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Copy at once."""
        with torch.inference_mode(False), torch.no_grad():
            for offset, tensor in parts:
                view_of(buffer, offset, tensor).copy_(tensor)

    def compute_after(self, ticket: Any) -> None:
        """Do nothing: the copies are done."""

    def copy_after_compute(self) -> None:
        """Do nothing: kernels are done when they return."""

    def finish(self) -> None:
        """Do nothing: the copies are done."""


def backend_for(device: torch.device) -> Backend:
    """The backend of a device, by whether torch has streams for it."""
    if device.type in ("cpu", "mps", "meta"):
        return DirectBackend(device)
    return TorchBackend(device)


def another_handle(stream: torch.Stream) -> torch.Stream:
    """The same stream for another thread: a handle stores what the end of its `with` restores (torch 2.13,
    `THPStream.context`), and threads that share one would restore each other's stream."""
    return torch.Stream(stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type)


def view_of(buffer: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor like another one in a flat buffer of bytes, from this offset on."""
    size = like.numel() * like.element_size()
    flat = buffer[offset : offset + size].view(like.dtype)
    return flat.as_strided(like.shape, like.stride()) if is_dense(like) else flat.view(like.shape)


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor as bytes; of one with gaps, a contiguous copy."""
    dense = tensor if is_dense(tensor) else tensor.contiguous()
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def read_ahead(tensor: torch.Tensor) -> None:
    """Ask the system to read the pages of a mapped file. Does nothing for other memory, and on other systems."""
    if sys.platform != "linux":
        return
    start = tensor.data_ptr() & ~(mmap.PAGESIZE - 1)
    length = tensor.data_ptr() + tensor.nbytes - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_WILLNEED)
