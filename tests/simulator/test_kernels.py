"""The workspaces of kernels: one rule for convolutions, by dtype, size and card."""

from __future__ import annotations

import pytest
import torch

from vramplan.pipeline.describe import describe
from vramplan.profiles.catalogue import device_accelerator, load_device_profile
from vramplan.simulator.kernels import Kernels
from vramplan.simulator.model import SimulatedModel, kernels_of
from vramplan.workload import make_workload

BF16, FP32 = torch.bfloat16, torch.float32


def copied(
    dtype: torch.dtype, given: tuple[int, ...], channels: int, *, kernels: Kernels | None = None, last: bool = False
) -> tuple[int, int]:
    """Elements of the input and of the output of a convolution that are copied."""
    shape = torch.empty(given, dtype=dtype, device="meta")
    if last:
        shape = shape.to(memory_format=torch.channels_last)
    made = torch.empty((given[0], channels, *given[2:]), dtype=dtype, device="meta")
    elements = (kernels or Kernels()).convolution_bytes(shape, made) // shape.element_size()
    inside = shape.numel() if elements else 0
    assert elements - inside in (0, made.numel())
    return inside, elements - inside


@pytest.mark.parametrize(
    ("batch", "given", "made", "output"),
    [
        (1, 256, 256, True),  # FLUX.1's last upsampler at 1024 x 1024
        (4, 256, 256, False),  # 2^30 elements, as many channels out as in
        (4, 256, 128, True),  # 2^29
        (8, 256, 128, True),  # 2^30, but fewer channels out than in
        (16, 256, 128, False),  # 2^31
    ],
)
def test_in_half_precision_the_output_is_copied_while_it_is_not_too_large(
    batch: int, given: int, made: int, output: bool
) -> None:
    found = copied(BF16, (batch, given, 1024, 1024), made)
    assert found == (batch * given << 20, output * (batch * made << 20))


def test_the_limit_by_channels_is_for_pictures_alone() -> None:
    """HunyuanVideo's decoder copies both, 1.9e9 and 1.7e9 elements (published peak)."""
    shape = (1, 128, 32, 512, 640)
    assert copied(BF16, shape, 128) == (128 * 32 * 512 * 640,) * 2


def test_in_float32_the_input_alone_is_copied_where_there_is_tf32() -> None:
    shape = (1, 256, 1024, 1024)
    assert copied(FP32, shape, 256) == (256 << 20, 0)
    assert copied(FP32, shape, 256, kernels=Kernels(tf32=False)) == (0, 0)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_an_input_in_channels_last_is_not_copied(dtype: torch.dtype) -> None:
    assert copied(dtype, (1, 256, 64, 64), 256, last=True) == (0, 0)


@pytest.mark.parametrize(
    ("card", "tf32"), [("rtx-4090", True), ("a100-80gb", True), ("t4", False), ("v100-32gb", False)]
)
def test_tf32_is_of_ampere_and_later(card: str, tf32: bool) -> None:
    assert kernels_of(device_accelerator(load_device_profile(card)))["tf32"] is tf32


def test_an_unknown_card_is_taken_to_have_tf32() -> None:
    assert kernels_of(None)["tf32"] is True


@pytest.mark.parametrize(("card", "said"), [("t4", True), ("rtx-4090", False)])
def test_a_simulation_says_so_where_the_workspace_is_not_known(card: str, said: bool) -> None:
    described = describe("stable-diffusion-1.5", dtype="float32")
    accelerator = device_accelerator(load_device_profile(card))
    work = make_workload(described.defaults, {"height": 64, "width": 64})
    notes = SimulatedModel(described.spec).run(work, (), (), accelerator=accelerator).notes
    assert any("before Ampere" in note for note in notes) is said
