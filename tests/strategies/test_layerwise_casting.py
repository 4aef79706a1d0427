"""Weights in 8 bits: priced as they are, taken only where it is allowed, and never said to be undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from make_pipeline import build

import vramplan
from tests.support.calls import call_kwargs, output_tensor
from vramplan.errors import NothingFitsError, UsageError, VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.geometry import module_bytes
from vramplan.pipeline.modules import modules_of
from vramplan.simulator.alternatives import converted_copy
from vramplan.simulator.parts import parts_from_profile
from vramplan.simulator.run import run_simulation
from vramplan.strategies.layerwise_casting import LayerwiseCasting
from vramplan.units import GIB
from vramplan.workload import Workload

SMALL = {"sd15-small": "unet", "sdxl-small": "unet", "flux-small": "transformer", "cogvideox-small": "transformer"}
CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))
SIZE = {"height": 64, "width": 64}


def small(kind: str) -> Any:
    pipe = build(kind)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", SMALL)
def test_the_light_copy_weighs_what_the_real_one_does(kind: str) -> None:
    module = modules_of(small(kind))[SMALL[kind]]
    before = module_bytes(module)
    copy = converted_copy(module, LayerwiseCasting())
    assert module_bytes(module) == before
    assert all(tensor.is_meta for tensor in copy.parameters())
    light = describe_component(SMALL[kind], copy)
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    real = describe_component(SMALL[kind], module)
    assert light.weight_bytes == real.weight_bytes < before
    assert light.geometry == real.geometry
    assert light.dtype_bytes == real.dtype_bytes


def test_flux_takes_what_was_measured() -> None:
    """Published: 28.451 GiB reserved, cast before it was moved (Hugging Face blog diffusers-quantization)."""

    def place(pipe: Any) -> None:
        LayerwiseCasting().apply(pipe, ["transformer"], "cuda:0")
        pipe.to("cuda:0")

    found = run_simulation(parts_from_profile("flux.1-dev"), Workload(height=1024, width=1024), place)
    assert found.peak_reserved_bytes / GIB == pytest.approx(28.451, rel=0.01)


def tight(pipe: Any) -> str:
    """Room for half of the denoiser, as it is stored, beside all else."""
    resident = vramplan.plan(pipe, device=MACHINE, settings={"placement": "resident"}, **SIZE)
    denoiser = next(item for item in resident.model.components if item.name in ("unet", "transformer"))
    return str(resident.projected.vram_reserved_bytes - denoiser.weight_bytes // 3)


def test_it_is_taken_only_where_it_is_allowed() -> None:
    pipe = small("flux-small")
    vram = tight(pipe)
    for allow in (None, "lossless", "near_lossless"):
        plan = vramplan.plan(pipe, device=MACHINE, vram=vram, allow=allow, **SIZE)  # type: ignore[arg-type]
        assert plan.settings.weights == {}
        assert "layerwise" not in str(plan.candidates)
    lossy = vramplan.plan(pipe, device=MACHINE, vram=vram, allow="lossy", **SIZE)
    assert any(item.settings.weights for item in lossy.candidates)
    assert lossy.projected.seconds_per_call <= plan.projected.seconds_per_call * 1.01


def test_by_hand_it_is_taken_and_applied_and_not_undone() -> None:
    pipe = small("flux-small")
    plain = output_tensor(pipe(**call_kwargs("flux-small")))
    settings = {"weights.transformer": "layerwise_casting", "placement": "resident"}
    plan = vramplan.plan(pipe, device=MACHINE, settings=settings, **SIZE)
    assert plan.quality == "lossy"
    assert plan.settings.weights == {"transformer": "layerwise_casting"}
    assert "transformer: layerwise_casting" in str(plan)
    stored = vramplan.plan(pipe, device=MACHINE, settings={"placement": "resident"}, **SIZE)
    assert plan.projected.vram_reserved_bytes <= stored.projected.vram_reserved_bytes
    applied = vramplan.apply_plan(pipe, plan, device="cpu")
    assert any("enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn" in call for call in applied.calls)
    cast = output_tensor(pipe(**call_kwargs("flux-small")))
    assert not torch.equal(cast, plain)
    assert torch.allclose(cast, plain, atol=0.2)
    assert vramplan.apply_plan(pipe, plan, device="cpu") is applied
    with pytest.raises(VramplanError, match="cannot be undone: load the pipeline again"):
        applied.undo()
    with pytest.raises(VramplanError, match="cannot be undone"):
        vramplan.apply_plan(pipe, stored, device="cpu")


def test_a_plan_with_weights_survives_its_file() -> None:
    from vramplan.planfile.file import dump_plan, parse_plan

    settings = {"weights.transformer": "layerwise_casting:storage=float8_e5m2"}
    plan = vramplan.plan(small("flux-small"), device=MACHINE, settings=settings, **SIZE)
    assert parse_plan(dump_plan(plan)).settings == plan.settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights.text_encoder": "layerwise_casting"}, "is no model of diffusers"),
        ({"weights.nothing": "layerwise_casting"}, "has no nothing, only"),
        ({"weights.transformer": "int3"}, "'int3' is not a strategy here"),
        ({"weights.transformer": "layerwise_casting:storage=int8"}, "use one of float8_e4m3fn, float8_e5m2"),
        ({"wait": "layerwise_casting"}, "the axes are weights.COMPONENT, attention.COMPONENT, placement"),
    ],
)
def test_what_cannot_be_is_one_clear_line(settings: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        vramplan.plan(small("flux-small"), device=MACHINE, settings=settings, **SIZE)


def test_by_hand_and_forbidden_is_refused() -> None:
    settings = {"weights.transformer": "layerwise_casting"}
    with pytest.raises(NothingFitsError, match='`allow="lossy"` would'):
        vramplan.plan(small("flux-small"), device=MACHINE, settings=settings, allow="lossless", **SIZE)
