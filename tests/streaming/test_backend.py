"""Every line of `TorchBackend`, on an accelerator of which nobody needs to own one."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from tests.support.fake_accelerator import FakeAccelerator, OnDevice
from vramplan.streaming import backend
from vramplan.streaming.backend import DirectBackend, TorchBackend, another_handle, backend_for, flat_bytes, view_of

CPU = torch.device("cpu")
STAGE = 1024


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    made = FakeAccelerator()
    monkeypatch.setattr(backend, "torch", made)
    monkeypatch.setattr(backend, "STAGE_BYTES", STAGE)
    return made


def weights(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def read(device: FakeAccelerator, buffer: torch.Tensor) -> list[torch.Tensor]:
    """Launch a kernel that notes what is in the buffer when it runs."""
    seen: list[torch.Tensor] = []
    device.launch(lambda: seen.append(buffer.as_subclass(torch.Tensor).clone()))
    return seen


def copied(engine: TorchBackend, buffer: torch.Tensor, data: torch.Tensor) -> Any:
    chunk = engine.page_lock(data.numel(), "transformer")
    engine.write(chunk, 0, data)
    half = data.numel() // 2
    return engine.copy(buffer, [(chunk, 0, 0, half), (chunk, half, half, data.numel() - half)])


def gathered(engine: TorchBackend, buffer: torch.Tensor, data: torch.Tensor) -> Any:
    return engine.gather(buffer, [(0, data[:300]), (300, data[300:])])


@pytest.mark.parametrize("move", [copied, gathered])
def test_a_kernel_after_the_ticket_reads_the_copies(device: FakeAccelerator, move: Any) -> None:
    engine, data = TorchBackend(CPU), weights(7 * STAGE)  # more pieces than page-locked buffers
    buffer = engine.allocate(data.numel(), "transformer")
    engine.compute_after(move(engine, buffer, data))
    seen = read(device, buffer)
    device.run(device.default)
    torch.testing.assert_close(seen[0], data, rtol=0, atol=0)


def test_a_kernel_that_does_not_wait_reads_something_else(device: FakeAccelerator) -> None:
    """The device is one on which a forgotten wait shows."""
    engine, data = TorchBackend(CPU), weights(STAGE)
    buffer = engine.allocate(data.numel(), "transformer")
    copied(engine, buffer, data)
    seen = read(device, buffer)
    device.run(device.default)
    assert not torch.equal(seen[0], data)


@pytest.mark.parametrize("move", [copied, gathered])
@pytest.mark.parametrize("ordered", [True, False])
def test_copies_overwrite_nothing_that_a_kernel_is_still_to_read(
    device: FakeAccelerator, move: Any, ordered: bool
) -> None:
    engine, old, new = TorchBackend(CPU), weights(STAGE), weights(STAGE, seed=1)
    buffer = engine.allocate(STAGE, "transformer")
    engine.compute_after(move(engine, buffer, old))
    seen = read(device, buffer)
    if ordered:
        engine.copy_after_compute()
    move(engine, buffer, new)
    engine.finish()  # the copies run before any kernel that they do not wait for
    device.run(device.default)
    assert torch.equal(seen[0], old) == ordered


def test_new_memory_is_filled_after_the_kernels_before_it(device: FakeAccelerator) -> None:
    engine, ran = TorchBackend(CPU), []
    device.launch(lambda: ran.append("kernel"))
    buffer = engine.allocate(STAGE, "transformer")
    copied(engine, buffer, weights(STAGE))
    engine.finish()
    assert ran == ["kernel"]


def test_threads_that_copy_at_once_keep_their_own_streams(device: FakeAccelerator) -> None:
    """The copier enters the side stream, then the launching thread; the copier leaves it first."""
    engine, own = TorchBackend(CPU), device.Stream(CPU)
    device.current = own
    buffer = engine.allocate(2 * STAGE, "transformer")
    copier_inside, launcher_inside = threading.Event(), threading.Event()
    plain = OnDevice.__torch_function__.__func__  # type: ignore[attr-defined]

    def in_turn(cls: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.copy_:
            if threading.current_thread() is threading.main_thread():
                launcher_inside.set()
                ticket.result(10)
            else:
                copier_inside.set()
                assert launcher_inside.wait(10)
        return plain(cls, function, types, args, kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnDevice, "__torch_function__", classmethod(in_turn))
        ticket = engine.gather(buffer[:STAGE], [(0, weights(STAGE))])
        assert copier_inside.wait(10)
        copied(engine, buffer[STAGE:], weights(STAGE, seed=1))
    assert device.current is own
    assert engine._copier is not None
    assert engine._copier.submit(lambda: device.current).result() is device.default


def test_one_handle_for_both_threads_would_mix_their_streams(device: FakeAccelerator) -> None:
    """Why there are two: the first thread gets the stream of the second."""
    side, other = device.Stream(CPU), device.Stream(CPU)
    side.__enter__()

    def enter() -> None:
        device.current = other
        side.__enter__()

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    side.__exit__()
    assert device.current is other


@pytest.mark.parametrize("granted", [0, 2])
def test_memory_that_cannot_be_page_locked_is_copied_directly(device: FakeAccelerator, granted: int) -> None:
    device.refuse_after = granted
    engine, data = TorchBackend(CPU), weights(7 * STAGE)
    buffer = engine.allocate(data.numel(), "transformer")
    engine.compute_after(gathered(engine, buffer, data))
    seen = read(device, buffer)
    device.run(device.default)
    torch.testing.assert_close(seen[0], data, rtol=0, atol=0)
    assert device.locked == granted
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.page_lock(STAGE, "transformer")


def test_a_failed_gather_is_raised_where_its_block_is_needed(device: FakeAccelerator) -> None:
    engine = TorchBackend(CPU)
    buffer = engine.allocate(STAGE, "transformer")
    ticket = engine.gather(buffer, [(0, weights(2 * STAGE))])  # does not fit
    with pytest.raises(RuntimeError):
        engine.compute_after(ticket)
    engine.finish()


def test_buffers_are_ordinary_tensors_in_inference_mode(device: FakeAccelerator) -> None:
    engine, like = TorchBackend(CPU), torch.nn.Parameter(torch.randn(4, 6).t(), requires_grad=False)
    with torch.inference_mode():
        buffer = engine.allocate(1024, "transformer")
        view = engine.view(buffer, 512, like)
        master = engine.write(engine.page_lock(1024, "transformer"), 512, like)
    assert not any(made.is_inference() for made in (buffer, view, master))
    assert view.stride() == master.stride() == like.stride()
    torch.testing.assert_close(master.as_subclass(torch.Tensor), like.data, rtol=0, atol=0)


def test_the_handle_of_another_thread_is_the_same_stream() -> None:
    """With torch's own streams, of which the CPU has one."""
    stream = torch.Stream(CPU)
    assert another_handle(stream) == stream
    assert another_handle(stream) is not stream


def test_devices_without_streams_copy_at_once() -> None:
    engine, data = backend_for(CPU), weights(STAGE)
    assert isinstance(engine, DirectBackend)
    first, second = (engine.allocate(STAGE, "vae") for _ in range(2))
    ticket = copied(engine, first, data)  # type: ignore[arg-type]
    engine.copy_after_compute()
    engine.compute_after(ticket)
    engine.compute_after(engine.gather(second, [(0, data)]))
    engine.finish()
    assert torch.equal(first, data)
    assert torch.equal(second, data)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).view(4, 6),
        torch.arange(24.0).view(4, 6).t(),
        torch.arange(48.0).view(4, 12)[:, ::2],
        torch.arange(16.0, dtype=torch.bfloat16)[3:9],
        torch.tensor([True, False, True]),
        torch.tensor(3.0),
        torch.empty(0),
    ],
    ids=["dense", "transposed", "gaps", "offset", "bool", "scalar", "empty"],
)
def test_bytes_of_a_tensor_come_back_as_the_same_tensor(tensor: torch.Tensor) -> None:
    data = flat_bytes(tensor)
    buffer = torch.zeros(1024, dtype=torch.uint8)
    buffer[512 : 512 + data.numel()] = data
    assert torch.equal(view_of(buffer, 512, tensor), tensor)
