"""Small real pipelines of every family on the simulated device, and what they really do on the CPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import accelerate.hooks
import accelerate.utils.modeling
import numpy as np
import pytest
import torch
from diffusers.hooks import group_offloading
from diffusers.pipelines import pipeline_utils
from torch.nn.attention import flex_attention
from torch.nn.modules import module as nn_module

from tests.support.families import FAMILIES, make_family
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.live import spec_from_pipeline
from vramplan.pipeline.modules import modules_of
from vramplan.simulator.memo import Memo
from vramplan.simulator.model import SimulatedModel
from vramplan.simulator.run import call_inputs
from vramplan.simulator.types import Simulation
from vramplan.strategies.settings import grouped, parse_placement
from vramplan.strategies.weight_streaming import WeightStreaming, streaming_sizes
from vramplan.streaming.division import worth_streaming
from vramplan.units import GIB

CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=8 * GIB, free_bytes=8 * GIB)
OFFLOADS = (
    "model_cpu_offload",
    "weight_streaming",
    "sequential_cpu_offload",
    "group_offload",
    "group_offload:type=leaf,stream=true",
)
pytestmark = pytest.mark.usefixtures("_quiet_libraries")


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    """Each family in turn, for all tests together."""
    return str(request.param)


def test_there_are_enough_families() -> None:
    assert len(FAMILIES) >= 30


def test_resident_has_everything_on_the_device(name: str) -> None:
    result = simulated(name, "resident")
    assert isinstance(result, Simulation)
    check_course(result)
    total = model_of(name).spec.weight_bytes
    assert weights_while_denoising(result) >= total
    assert result.host_peak_bytes >= total


@pytest.mark.diagonal("name", "placement")
@pytest.mark.parametrize("placement", OFFLOADS)
def test_offload_does_the_same_with_less(name: str, placement: str) -> None:
    resident, offloaded = simulated(name, "resident"), simulated(name, placement)
    assert isinstance(resident, Simulation)
    if isinstance(offloaded, str):
        assert len(offloaded) > 20, "a reason is a sentence"
        return
    check_course(offloaded)
    assert offloaded.decoded == resident.decoded
    assert flops(offloaded) == flops(resident)
    if placement != "model_cpu_offload" or len(modules_of(make_family(name))) > 1:
        assert weights_while_denoising(offloaded) < weights_while_denoising(resident)
        assert offloaded.to_device_bytes > 0
    if "stream" in placement:
        assert offloaded.pinned_peak_bytes > 0


@pytest.mark.diagonal("name", "placement")
@pytest.mark.parametrize("placement", ["resident", "weight_streaming"])
def test_played_back_or_not_makes_no_difference(name: str, placement: str) -> None:
    played = simulated(name, placement)
    with patch.object(Memo, "attach", lambda *_: None):
        run = simulated.__wrapped__(name, placement)
    if isinstance(run, str):
        assert played == run
    else:
        assert isinstance(played, Simulation)
        assert replace(played, wall_seconds=0) == replace(run, wall_seconds=0)


def test_the_real_call_decodes_what_the_simulated_one_does(name: str) -> None:
    if not FAMILIES[name].real:
        pytest.skip("a real call takes long")
    pytest.importorskip(FAMILIES[name].needs)
    result, pipe = simulated(name, "resident"), make_family(name)
    assert isinstance(result, Simulation)
    expected = [(item.component, item.shape, item.dtype) for item in result.decoded]
    with decodes_of(pipe) as found, torch.random.fork_rng(devices=[]), torch.no_grad():
        pipe(**call_inputs(pipe, FAMILIES[name].workload))
    assert found == expected


# --- simulating --------------------------------------------------------------------------------------------


@cache
def model_of(name: str) -> SimulatedModel:
    """One for all placements: what one simulation recorded serves the next."""
    return SimulatedModel(spec_from_pipeline(make_family(name)))


@cache
def simulated(name: str, placement: str) -> Simulation | str:
    """The call with this placement wherever it can be; the reason where the pipeline cannot have it at all."""
    pipe, model, setting = make_family(name), model_of(name), parse_placement(placement)
    spec = model.spec
    wanted = {component.name: setting.complete(component) for component in spec.components}
    if isinstance(setting, WeightStreaming):  # as many blocks streamed as can be
        most = {c.name: len(worth_streaming(streaming_sizes(c))) for c in spec.components}
        wanted = {name: replace(setting, streamed=count if count > 2 else 0, locked=1) for name, count in most.items()}
    refused = {c.name: reason for c in spec.components if (reason := wanted[c.name].refusal(c, spec, CARD))}
    if refused and (setting.whole_pipeline or len(refused) == len(wanted)):
        return "; ".join(refused.values())
    placed = wanted | dict.fromkeys(refused, parse_placement("resident"))
    before = (marks_in_the_process(), marks_on(pipe))
    result = model.run(FAMILIES[name].workload, grouped(placed), [], accelerator=CARD)
    assert (marks_in_the_process(), marks_on(pipe)) == before
    return result


def check_course(result: Simulation) -> None:
    """It ran to the end, in an order that makes sense."""
    assert result.stopped is None
    phases = [phase.name for phase in result.phases]
    assert phases == [phase for phase in ("load", "encode", "denoise", "decode") if phase in phases]
    assert "denoise" in phases
    assert ("decode" in phases) == bool(result.decoded)
    for phase in result.phases:
        parts = phase.weights_bytes + phase.activation_bytes + phase.workspace_bytes
        assert 0 < parts == phase.peak_allocated_bytes <= result.peak_allocated_bytes <= result.peak_reserved_bytes
    assert any(use.flops > 0 for use in result.uses if use.phase == "denoise")


def weights_while_denoising(result: Simulation) -> int:
    return next(phase.weights_bytes for phase in result.phases if phase.name == "denoise")


def flops(result: Simulation) -> dict[tuple[str, str], float]:
    return {(use.phase, use.component): use.flops for use in result.uses if use.component}


# --- what must stay as it was ------------------------------------------------------------------------------


def marks_in_the_process() -> dict[str, Any]:
    """Everything that a simulation touches outside of its own tensors."""
    hooks = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_forward_hooks_always_called")
    patched = (
        (torch, "Generator"),
        (torch.Tensor, "to"),
        (torch.cuda, "empty_cache"),
        (torch.nn.functional, "scaled_dot_product_attention"),
        (flex_attention, "flex_attention"),
        (group_offloading, "TorchDeviceBackend"),
        (pipeline_utils, "empty_device_cache"),
        (accelerate.hooks, "clear_device_cache"),
        (accelerate.utils.modeling, "clear_device_cache"),
    )
    return {
        "patched": [getattr(owner, name, None) for owner, name in patched],
        "hooks": [list(getattr(nn_module, name)) for name in hooks],
        "modes": torch.overrides._get_current_function_mode_stack(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "gradients": torch.is_grad_enabled(),
        "random": (torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(np.random.get_state())),
    }


def marks_on(pipe: Any) -> dict[str, Any]:
    """The live pipeline: every tensor's kind, place and version, and every module's attributes."""
    return {
        f"{part}.{name}": (
            sorted(vars(module)),
            [
                (type(tensor), tensor.device.type, tensor.dtype, tensor.data_ptr(), tensor._version)
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
            ],
        )
        for part, root in modules_of(pipe).items()
        for name, module in root.named_modules()
    }


@contextmanager
def decodes_of(pipe: Any) -> Iterator[list[tuple[str, tuple[int, ...], str]]]:
    """Component, shape and dtype of all that the pipeline's autoencoders are given to decode."""
    found: list[tuple[str, tuple[int, ...], str]] = []

    def recorded(component: str, original: Any) -> Any:
        def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append((component, tuple(latents.shape), str(latents.dtype).removeprefix("torch.")))
            return original(latents, *args, **kwargs)

        return decode

    with ExitStack() as stack:
        for name, module in modules_of(pipe).items():
            if hasattr(module, "decode"):
                stack.enter_context(patch.object(module, "decode", recorded(name, module.decode)))
        yield found
