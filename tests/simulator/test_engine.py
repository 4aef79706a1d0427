"""Simulated tensors: devices, values, memory; and nothing left behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch

from vramplan.simulator.allocator import CachingAllocator
from vramplan.simulator.engine import Engine
from vramplan.simulator.kernels import Kernels
from vramplan.simulator.ledger import Ledger
from vramplan.simulator.parts import simulated_copy
from vramplan.simulator.run import simulated_devices


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(Ledger(CachingAllocator()), Kernels(cublas_bytes=0))
    with simulated_devices(made):
        yield made


def allocated(engine: Engine) -> int:
    return engine.ledger.allocator.allocated_bytes


def test_a_tensor_is_where_it_was_made(engine: Engine) -> None:
    made = torch.zeros(1000, 1000, device="cuda")
    assert made.device == torch.device("cuda:0")
    assert made.is_cuda
    assert allocated(engine) == 4_000_256  # rounded to 512


def test_memory_is_free_when_the_last_view_is(engine: Engine) -> None:
    made = torch.zeros(1000, 1000, device="cuda")
    view = made[10:20].T
    del made
    assert allocated(engine) == 4_000_256
    del view
    assert allocated(engine) == 0


def test_views_take_no_memory_and_copies_do(engine: Engine) -> None:
    made = torch.zeros(512, 512, device="cuda")
    before = allocated(engine)
    kept = [made.view(-1), made.permute(1, 0), made.unsqueeze(0), made.expand(4, 512, 512), made.detach()]
    assert allocated(engine) == before
    kept.append(made.clone())
    assert allocated(engine) == 2 * before


def test_small_values_are_true_and_large_ones_hollow(engine: Engine) -> None:
    steps = torch.linspace(0, 1, 5, device="cuda")
    assert (steps * 2 + 1).tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert float(steps.sum()) == 2.5
    assert bool((steps == 0.5).any())
    large = torch.zeros(1024, 1024, device="cuda")
    assert large.item() if large.numel() == 1 else float(large.sum()) == 0.0
    assert engine.notes  # the sum's value had to be assumed


def test_a_hollow_tensor_written_into_a_small_one_makes_it_forget(engine: Engine) -> None:
    small = torch.ones(4, device="cuda")
    view = small[:2]
    small += torch.zeros(2048, 1024, device="cuda")[0, :4]
    assert small.value is None  # type: ignore[attr-defined]
    assert view.value is None  # type: ignore[attr-defined]


def test_setting_an_item_keeps_values(engine: Engine) -> None:
    made = torch.zeros(4, device="cuda")
    made[1] = 5
    made[2:] = torch.tensor([7.0, 8.0])
    assert made.tolist() == [0.0, 5.0, 7.0, 8.0]


def test_boolean_masks_select_as_many_as_they_do(engine: Engine) -> None:
    mask = torch.tensor([True, False, True, True], device="cuda")
    data = torch.zeros(4, 1024, 512, device="cuda")
    assert data[mask].shape == (3, 1024, 512)
    assert torch.nonzero(mask).tolist() == [[0], [2], [3]]


def test_two_devices_do_not_mix(engine: Engine) -> None:
    with pytest.raises(RuntimeError, match=r"same device.*cpu and cuda:0"):
        torch.zeros(3, 3, device="cuda") @ torch.zeros(3, 3)


def test_nothing_is_copied_from_where_there_is_nothing(engine: Engine) -> None:
    nowhere = torch.zeros(4, device="cuda").to("meta")
    assert nowhere.device.type == "meta"
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        nowhere.to("cuda")


def test_scalars_on_the_cpu_mix_with_anything(engine: Engine) -> None:
    assert (torch.ones(3, device="cuda") * torch.tensor(2.0)).tolist() == [2.0, 2.0, 2.0]


def test_moving_a_module_moves_its_memory(engine: Engine) -> None:
    linear = simulated_copy(torch.nn.Linear(512, 512), engine)
    assert engine.ledger.host_bytes == 4 * (512 * 512 + 512)
    linear.to("cuda")
    assert engine.ledger.on_device["weights"] == 4 * 512 * 512 + 2048
    assert engine.ledger.host_bytes == 0
    assert isinstance(linear.weight, torch.nn.Parameter)
    linear.to("cpu", torch.float16)
    assert engine.ledger.on_device["weights"] == 0
    assert linear.weight.dtype == torch.float16


def test_hollow_copies_leave_the_module_alone_and_keep_ties(engine: Engine) -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8), "b": torch.nn.Linear(8, 8)})
    module["b"].weight = module["a"].weight
    made = simulated_copy(module, engine)
    assert made["a"].weight is made["b"].weight
    assert type(module["a"].weight) is torch.nn.Parameter
    assert made["a"].weight is not module["a"].weight


def test_pinned_memory_is_rounded_to_a_power_of_two(engine: Engine) -> None:
    linear = simulated_copy(torch.nn.Linear(600, 500, bias=False), engine)
    pinned = linear.weight.data.pin_memory()
    assert pinned.is_pinned()
    assert engine.ledger.pinned_bytes == 1 << 21


def test_attention_does_not_make_the_matrix_of_all_against_all(engine: Engine) -> None:
    query = torch.zeros(1, 8, 4096, 64, device="cuda", dtype=torch.bfloat16)
    before = allocated(engine)
    engine.ledger.allocator.peak_allocated_bytes = 0
    made = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert made.shape == query.shape
    rows = 8 * 4096
    assert engine.ledger.allocator.peak_allocated_bytes == before + 2 * query.numel() + 4 * rows
    assert sum(cost.flops for cost in engine.ledger.costs.values()) == 4.0 * rows * 4096 * 64


def test_operations_are_counted(engine: Engine) -> None:
    left = torch.zeros(128, 256, device="cuda")
    _ = left @ torch.zeros(256, 64, device="cuda")
    assert sum(cost.flops for cost in engine.ledger.costs.values()) == 2 * 128 * 256 * 64


def test_a_full_device_raises_what_torch_raises() -> None:
    engine = Engine(Ledger(CachingAllocator(capacity_bytes=1 << 20), out_of_memory=torch.OutOfMemoryError), Kernels())
    with simulated_devices(engine), pytest.raises(torch.OutOfMemoryError, match="tried to allocate 4 MiB"):
        torch.zeros(1024, 1024, device="cuda")


def interrupted_after(act: Callable[[], None]) -> None:
    act()
    raise KeyboardInterrupt


def test_nothing_is_left_when_a_simulation_ends() -> None:
    import accelerate.hooks
    from diffusers.hooks import group_offloading

    before = (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.cuda.empty_cache,
        group_offloading.TorchDeviceBackend,
        accelerate.hooks.clear_device_cache,
        torch.overrides._get_current_function_mode_stack(),
    )
    engine = Engine(Ledger(CachingAllocator()), Kernels())
    kept = []
    with pytest.raises(KeyboardInterrupt), simulated_devices(engine):
        interrupted_after(lambda: kept.append(torch.zeros(10, device="cuda")))
    after = (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.cuda.empty_cache,
        group_offloading.TorchDeviceBackend,
        accelerate.hooks.clear_device_cache,
        torch.overrides._get_current_function_mode_stack(),
    )
    assert before == after
    assert torch.zeros(3).device.type == "cpu"
    kept.clear()
    gc.collect()
    assert engine.ledger.allocator.allocated_bytes == 0
