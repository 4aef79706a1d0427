"""A device with streams and events, on bytes of the CPU, that finds races: two accesses to the same memory, one of them
a write, that nothing orders.

`TorchBackend` runs on it unchanged. Every stream and host thread has a vector clock, and every granule of memory knows
the time of its last read and write by each: so an access that is not ordered after another one is found under every
schedule, also where this one went well. Copies are late besides, as chosen: their bytes arrive only when something
waits for them, and until then the memory holds garbage. Freed device memory is handed out again at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.race_memory import GARBAGE, GRANULE, Zone
from vramplan.streaming import attach, backend, hooks

HOST, COPIER, COMPUTE, SIDE = range(4)
_ACTORS = ("the host", "the copier thread", "a kernel", "a copy")
# Operations that may read host memory while a module runs: the engine's own copies.
_NO_ACCESS = {"aten::_has_compatible_shallow_copy_type", "aten::empty_like", "aten::is_same_size"}
_COPIES = {"aten::copy_", "aten::clone", "aten::_to_copy", "aten::detach"}


class RaceError(AssertionError):
    """Two accesses to the same memory that nothing orders, or a kernel that would not find its operand."""


class Event:
    """A point on a stream: its clock, and the number of copies before it."""

    def __init__(self, device: RaceDevice, clock: np.ndarray, copies: int) -> None:
        self.device = device
        self.clock = clock
        self.copies = copies

    def synchronize(self) -> None:
        """Let the host wait for it."""
        self.device.step("synchronize")
        self.device.order(self.device.host, self)


class Stream:
    """A stream of the device, as far as `TorchBackend` uses it."""

    def __init__(self, device: RaceDevice, actor: int) -> None:
        self.device = device
        self.actor = actor

    def __enter__(self) -> None:
        self.device.current.append(self)

    def __exit__(self, *_: object) -> None:
        self.device.current.pop()

    def record_event(self) -> Event:
        """An event after all that is enqueued so far."""
        self.device.step("record_event")
        return self.device.event(self.actor)

    def wait_event(self, event: Event) -> None:
        """Let what is enqueued later wait for the event."""
        self.device.step("wait_event")
        self.device.order(self.actor, event)

    def synchronize(self) -> None:
        """Let the host wait for all that is enqueued."""
        self.device.step("synchronize")
        self.device.order(self.device.host, self.device.event(self.actor))


class Thread:
    """A `ThreadPoolExecutor` of one thread. Tasks run at once or, when they are late, once they are waited for."""

    def __init__(self, device: RaceDevice) -> None:
        self.device = device
        self.tasks: deque[tuple[Ticket, Any, Any, np.ndarray]] = deque()

    def submit(self, function: Callable[..., Any], *args: Any) -> Ticket:
        """Run it now or later."""
        self.device.step("submit")
        ticket = Ticket(self)
        self.tasks.append((ticket, function, args, self.device.clocks[self.device.host].copy()))
        if not self.device.late():
            self.run_until(ticket)
        return ticket

    def run_until(self, ticket: Ticket) -> None:
        """Run what was submitted before this and this, as the copier thread."""
        device = self.device
        while not ticket.done():
            now, function, args, clock = self.tasks.popleft()
            before, device.host = device.host, COPIER
            device.clocks[COPIER] = np.maximum(device.clocks[COPIER], clock)
            try:
                with torch.inference_mode(False), torch.enable_grad():
                    now.set_result(function(*args))
            except Exception as error:
                now.set_exception(error)
            finally:
                now.clock = device.clocks[COPIER].copy()
                device.host = before


class Ticket(Future[Any]):
    """The result of a task."""

    def __init__(self, thread: Thread) -> None:
        super().__init__()
        self.thread = thread
        self.clock: Any = None

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the task: it happens before what the host does from now on."""
        device = self.thread.device
        device.step("result")
        self.thread.run_until(self)
        device.clocks[device.host] = np.maximum(device.clocks[device.host], self.clock)
        return super().result(timeout)


class RaceDevice(TorchDispatchMode):
    """The device, and the mode that sees every operation on its memory.

    `late` says of each copy whether it is late. `before_step` is called with the name of each thing that the host asks
    the device for, and may raise.
    """

    def __init__(self, late: Callable[[], bool], zone_bytes: int = 64 << 20) -> None:
        super().__init__()
        self.late = late
        self.before_step: Callable[[str], None] = lambda name: None
        self.memory = Zone("device memory", zone_bytes)
        self.locked = Zone("page-locked memory", zone_bytes)
        self.host_memory = Zone("host memory", zone_bytes)
        self.zones = (self.memory, self.locked, self.host_memory)
        self.clocks = np.zeros((4, 4), np.int32)
        self.host = HOST
        self.compute = Stream(self, COMPUTE)
        self.side = Stream(self, SIDE)
        self.current: list[Stream] = []
        self.depth = 0
        self.steps = 0
        self.kernels = 0
        self._copies = 0
        self._pending: deque[tuple[int, Callable[[], None]]] = deque()

    # ---- order

    def step(self, name: str) -> None:
        """Count what the main thread asks for."""
        if self.host == HOST:
            self.steps += 1
            self.before_step(name)

    def event(self, actor: int) -> Event:
        """An event on a stream."""
        return Event(self, np.maximum(self.clocks[actor], self.clocks[self.host]), self._copies)

    def order(self, actor: int, event: Event) -> None:
        """Let an actor go on after an event; late copies before it arrive."""
        self.clocks[actor] = np.maximum(self.clocks[actor], event.clock)
        if event.clock[SIDE] and actor != SIDE:
            while self._pending and self._pending[0][0] <= event.copies:
                self._pending.popleft()[1]()

    def _launch(self, actor: int) -> None:
        """Begin an operation of an actor, after all that the host has done and waited for."""
        if actor in (COMPUTE, SIDE):
            self.clocks[actor] = np.maximum(self.clocks[actor], self.clocks[self.host])
        self.clocks[actor, actor] += 1

    def _access(self, actor: int, zone: Zone, part: slice, *, write: bool) -> None:
        known = self.clocks[actor]
        for other in range(4):
            if other == actor:
                continue
            if (zone.last_write[other, part] > known[other]).any():
                raise RaceError(self._message(actor, write, other, "written", zone))
            if write and (zone.last_read[other, part] > known[other]).any():
                raise RaceError(self._message(actor, write, other, "read", zone))
        (zone.last_write if write else zone.last_read)[actor, part] = known[actor]

    def _message(self, actor: int, write: bool, other: int, did: str, zone: Zone) -> str:
        act = "writes" if write else "reads"
        return f"{_ACTORS[actor]} {act} {zone.name} that {_ACTORS[other]} has {did}, and nothing orders the two"

    # ---- memory

    def allocate(self, size: int) -> torch.Tensor:
        """Device memory."""
        self.step("allocate")
        self.reuse()
        return self.memory.allocate(size)

    def page_lock(self, size: int) -> torch.Tensor:
        """Page-locked memory. It is not handed out again, as torch's allocator does not before its copies are done."""
        self.step("page_lock")
        return self.locked.allocate(size)

    def adopt(self, module: torch.nn.Module) -> None:
        """Move the weights of a module into watched host memory."""
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                if not hasattr(tensor, "__tensor_flatten__") and self.host_memory.part(tensor) is None:
                    tensor.data = self._like(self.host_memory, tensor)

    def adopt_all(self, pipe: Any) -> None:
        """Move the weights of a pipeline's modules into watched host memory."""
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                self.adopt(module)

    def here(self) -> AbstractContextManager[Any]:
        """Context manager that watches the operations of another thread."""
        return _Elsewhere(self)

    def keep(self, tensor: torch.Tensor, device: Any) -> None:
        """Move a tensor to the device for good, as `streaming.tensors.move`."""
        if not hasattr(tensor, "__tensor_flatten__"):
            with torch.no_grad():
                tensor.data = self._like(self.memory, tensor)

    def _like(self, zone: Zone, tensor: torch.Tensor) -> torch.Tensor:
        return backend.view_of(zone.allocate(tensor.nbytes), 0, tensor.data).copy_(tensor.data)

    def reuse(self) -> None:
        """Freed memory goes to kernels at once: torch hands it out in the order of the compute stream."""
        while self.memory.freed:
            start, length = self.memory.freed.popleft()
            self._launch(COMPUTE)
            part = slice(start // GRANULE, (start + length) // GRANULE)
            self._access(COMPUTE, self.memory, part, write=True)
            self.memory.bytes[start : start + length] = GARBAGE
            self.memory.free.append((start, length))
            self.memory.used -= length

    # ---- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what an operation reads and writes, then run it; a late copy later."""
        kwargs = kwargs or {}
        if func.is_view or func.namespace == "prim" or func._schema.name in _NO_ACCESS:
            return func(*args, **kwargs)
        touched = list(self._touched(func, args, kwargs))
        if not touched:
            self.reuse()
            return func(*args, **kwargs)
        if self.current and self.current[-1].actor == SIDE:
            return self._side_copy(func, args, kwargs, touched)
        self._note(func, touched)
        return func(*args, **kwargs)

    def _touched(self, func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Zone, slice, bool]]:
        for place, argument in enumerate(func._schema.arguments):
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            write = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in given if isinstance(given, list | tuple) else (given,):
                for plain in _plain(tensor):
                    for zone in self.zones:
                        if (part := zone.part(plain)) is not None:
                            yield zone, part, write

    def _note(self, func: Any, touched: Sequence[tuple[Zone, slice, bool]]) -> None:
        on_device = any(zone is self.memory for zone, _, _ in touched)
        on_host = any(zone is not self.memory for zone, _, _ in touched)
        name = func._schema.name
        if on_host and name not in _COPIES and (on_device or self.depth):
            raise RaceError(f"a kernel ({name}) would read a weight in host memory")
        actor = COMPUTE if on_device else self.host
        self.reuse()
        self._launch(actor)
        self.kernels += on_device
        for zone, part, write in touched:
            self._access(actor, zone, part, write=write)
        if on_device and on_host:  # a copy without `non_blocking` returns when it is done
            self.order(self.host, self.event(COMPUTE))

    def _side_copy(self, func: Any, args: Any, kwargs: Any, touched: Sequence[tuple[Zone, slice, bool]]) -> Any:
        """Enqueue a copy on the side stream."""
        assert func._schema.name == "aten::copy_", f"{func} on the copy stream"
        self.step("copy")
        self.reuse()
        target, source = args[0], args[1]
        self._launch(SIDE)
        for zone, part, write in touched:
            self._access(SIDE, zone, part, write=write)
        if not (kwargs.get("non_blocking") or args[2:]):
            self.order(self.host, self.event(SIDE))
            return func(*args, **kwargs)
        if self.locked.part(source) is None and source.numel():
            raise RaceError("an asynchronous copy from memory that is not page-locked")
        self._copies += 1
        there = self._raw(self.memory, target)
        here = self._raw(self.locked, source)
        # raw bytes and no tensors, which would keep the memory from being freed
        if self.late():
            there[:] = GARBAGE
            self._pending.append((self._copies, lambda: np.copyto(there, here)))
        else:
            np.copyto(there, here)
        return target

    @staticmethod
    def _raw(zone: Zone, tensor: torch.Tensor) -> Any:
        start = tensor.data_ptr() - zone.start
        return zone.bytes[start : start + tensor.nbytes]


class _Elsewhere(TorchDispatchMode):
    def __init__(self, device: RaceDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.device.__torch_dispatch__(func, types, args, kwargs)


def _plain(tensor: Any) -> Iterator[torch.Tensor]:
    if not isinstance(tensor, torch.Tensor):
        return
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    elif tensor.layout == torch.strided and tensor.device.type == "cpu":
        yield tensor


class _Torch:
    """`torch` as the backend sees it."""

    def __init__(self, device: RaceDevice) -> None:
        self.device = device
        self.accelerator = self

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def Stream(  # noqa: N802
        self, device: Any
    ) -> Stream:
        return self.device.side

    def current_stream(self, device: Any) -> Stream:
        return self.device.current[-1] if self.device.current else self.device.compute

    def empty(self, size: int, *, dtype: torch.dtype, device: Any = None, pin_memory: bool = False) -> torch.Tensor:
        assert dtype is torch.uint8
        return self.device.page_lock(size) if pin_memory else self.device.allocate(size)


@contextmanager
def race_device(late: Callable[[], bool] = lambda: True, stage_bytes: int = 4096) -> Iterator[RaceDevice]:
    """Context manager: streaming uses this device."""
    device = RaceDevice(late)
    call = torch.nn.Module.__call__

    def deeper(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = module._forward_pre_hooks.values()
        if not device.depth and not any(isinstance(hook, hooks.Before) for hook in given):
            return call(module, *args, **kwargs)
        device.depth += 1
        try:
            return call(module, *args, **kwargs)
        finally:
            device.depth -= 1

    with ExitStack() as stack:
        for place, name, value in (
            (backend, "torch", _Torch(device)),
            (backend, "ThreadPoolExecutor", lambda *_, **__: Thread(device)),
            (backend, "backend_for", lambda _: backend.TorchBackend(torch.device("cpu"))),
            (backend, "another_handle", lambda stream: stream),
            (backend, "STAGE_BYTES", stage_bytes),
            (attach, "move", device.keep),
            (torch.nn.Module, "__call__", deeper),
        ):
            stack.enter_context(patch.object(place, name, value))
        stack.enter_context(device)
        yield device
