"""An accelerator with streams and events, whose memory is the host's and whose streams run as late as they may.

It stands in for `torch` in a module under test. What is put into a stream runs when somebody waits for it: a kernel
that nothing orders after a copy finds the memory as it was before. `with stream` does what torch 2.13 does: the handle
remembers the streams to restore, last in, first out, whichever thread entered it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

PLAIN = torch._C.DisableTorchFunctionSubclass


class FakeAccelerator:
    """In place of `torch`: everything that is not here is torch's own."""

    def __init__(self) -> None:
        self.queues: dict[int, list[Any]] = {}
        self.refuse_after: int | None = None  # so many page-locked buffers are granted
        self.locked = 0
        self.accelerator = SimpleNamespace(current_stream=lambda device=None: self.current)
        self._threads = threading.local()
        self.default = self.Stream(torch.device("cpu"))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @property
    def current(self) -> Stream:
        """The stream of this thread."""
        return getattr(self._threads, "stream", self.default)

    @current.setter
    def current(self, stream: Stream) -> None:
        self._threads.stream = stream

    def Stream(  # noqa: N802 - torch's name
        self, device: Any = None, *, stream_id: int = -1, device_index: int = -1, device_type: int = -1
    ) -> Stream:
        if device is not None:
            stream_id, device_index, device_type = len(self.queues), 0, 1
            self.queues[stream_id] = []
        return Stream(self, stream_id, device_index, device_type)

    def empty(self, size: int, *, dtype: torch.dtype, device: Any = None, pin_memory: bool = False) -> torch.Tensor:
        if pin_memory:
            if self.refuse_after is not None and self.locked >= self.refuse_after:
                raise RuntimeError("CUDA error: out of memory")
            self.locked += 1
        made = torch.zeros(size, dtype=dtype).as_subclass(Locked if pin_memory else OnDevice)
        made.accelerator = self
        return made

    def launch(self, kernel: Callable[[], Any]) -> None:
        """Put a kernel into the current stream."""
        self.queues[self.current.stream_id].append(kernel)

    def run(self, stream: Stream, until: Any = None) -> None:
        """Do what is in the stream, or only what stands before an event."""
        queue = self.queues[stream.stream_id]
        while queue and not (until is not None and until.done):
            queue.pop(0)()


class Stream:
    def __init__(self, accelerator: FakeAccelerator, stream_id: int, device_index: int, device_type: int) -> None:
        self.accelerator = accelerator
        self.stream_id = stream_id
        self.device_index = device_index
        self.device_type = device_type
        self.device = torch.device("cpu")
        self._context: list[Stream] = []

    def __enter__(self) -> Stream:
        self._context.append(self.accelerator.current)
        self.accelerator.current = self
        return self

    def __exit__(self, *_: Any) -> None:
        self.accelerator.current = self._context.pop()

    def record_event(self) -> Event:
        event = Event(self)
        self.accelerator.queues[self.stream_id].append(event.complete)
        return event

    def wait_event(self, event: Event) -> None:
        self.accelerator.queues[self.stream_id].append(event.synchronize)

    def synchronize(self) -> None:
        self.accelerator.run(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.done = False

    def complete(self) -> None:
        self.done = True

    def synchronize(self) -> None:
        self.stream.accelerator.run(self.stream, until=self)


class Locked(torch.Tensor):
    """Page-locked host memory."""


class OnDevice(torch.Tensor):
    """Device memory: a copy into it is put into the current stream."""

    accelerator: FakeAccelerator

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.Tensor.copy_:
            made = super().__torch_function__(function, types, args, kwargs or {})
            if isinstance(made, OnDevice):
                made.accelerator = args[0].accelerator
            return made
        target, source = args
        device = target.accelerator
        if target.shape != source.shape:
            raise RuntimeError(f"a copy of {tuple(source.shape)} into {tuple(target.shape)}")

        def copy() -> None:
            with PLAIN(), torch.inference_mode(False), torch.no_grad():
                target.copy_(source)

        device.launch(copy)
        if not (isinstance(source, Locked) and (kwargs or {}).get("non_blocking")):
            device.current.synchronize()
        return target
