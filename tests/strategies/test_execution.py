"""Attention and compiled blocks: what can be set where, on live pipelines and back, and what is planned with it."""

from __future__ import annotations

import os
import shutil
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

import vramplan
from tests.support.families import FAMILIES
from tests.support.specs import GIB, card, component
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.component import describe_component
from vramplan.planner.candidates import execution_settings
from vramplan.planner.fixed import Fixed
from vramplan.simulator.allocator import CachingAllocator
from vramplan.simulator.engine import Engine
from vramplan.simulator.kernels import Kernels
from vramplan.simulator.ledger import Ledger
from vramplan.simulator.run import simulated_devices
from vramplan.strategies import EXECUTIONS
from vramplan.strategies.attention_backend import AttentionBackend
from vramplan.strategies.attention_slicing import AttentionSlicing
from vramplan.strategies.compile_repeated_blocks import CompileRepeatedBlocks
from vramplan.strategies.kernel_state import KernelState
from vramplan.strategies.layerwise_casting import LayerwiseCasting
from vramplan.strategies.resident import Resident
from vramplan.strategies.sequential_cpu_offload import SequentialCpuOffload
from vramplan.strategies.settings import format_setting, grouped, parse_setting
from vramplan.strategies.weight_streaming import WeightStreaming

HOST = Host(total_bytes=32 * GIB, available_bytes=30 * GIB)
CUDA = Hardware(accelerators=(card(8 * GIB),), host=HOST)
METAL = card(8 * GIB, kind="mps", name="Apple M3", unified=True)
TURING = card(8 * GIB, name="Tesla T4")


def tiny_unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    ).eval()


def tiny_flux() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()


class Pipe:
    """What settings ask of a pipeline."""

    def __init__(self, **components: Any) -> None:
        self.components = components
        self.__dict__.update(components)


def described(module: Any, name: str = "transformer") -> Any:
    return describe_component(name, module)


# --- what can be set where -------------------------------------------------------------------------------


def test_only_modules_that_can_take_a_setting_are_not_refused() -> None:
    unet, flux = described(tiny_unet(), "unet"), described(tiny_flux())
    assert AttentionSlicing().refusal(unet, METAL) is None
    assert "FluxTransformer2DModel has no attention slicing" in str(AttentionSlicing().refusal(flux, METAL))
    assert AttentionBackend().refusal(flux, card()) is None
    assert "do not ask for a backend" in str(AttentionBackend().refusal(unet, card()))
    for able in (unet, flux):
        assert CompileRepeatedBlocks().refusal(able, None) is None


def test_slicing_would_take_other_processors_off_and_is_refused() -> None:
    from diffusers.models.attention_processor import XFormersAttnProcessor

    unet = tiny_unet()
    unet.set_attn_processor(XFormersAttnProcessor())
    assert "would take XFormersAttnProcessor off" in str(described(unet, "unet").attention_slicing_refusal)


@pytest.mark.parametrize("cls", EXECUTIONS)
def test_other_components_are_refused(cls: Any) -> None:
    from diffusers import AutoencoderKL

    vae = described(AutoencoderKL(block_out_channels=(32,), norm_num_groups=4), "vae")
    assert "AutoencoderKL" in str(cls().refusal(vae, card()))
    assert not list(cls.variants(vae, METAL))


@pytest.mark.parametrize(
    ("backend", "accelerator", "words"),
    [
        ("sdpa", card(), "not an attention backend of this diffusers"),
        ("sagee", card(), "did you mean sage?"),
        ("flash_hub", card(), "downloads code and runs it"),
        ("_native_npu", card(), "needs an Ascend NPU"),
        ("_native_cudnn", METAL, "needs a CUDA or ROCm device, not Apple M3"),
        ("_native_flash", None, "not the CPU"),
    ],
)
def test_a_backend_that_cannot_be_is_refused(backend: str, accelerator: Accelerator | None, words: str) -> None:
    assert words in str(AttentionBackend(backend=backend).refusal(described(tiny_flux()), accelerator))


def test_a_backend_whose_package_is_missing_is_refused() -> None:
    from diffusers.models import attention_dispatch

    if attention_dispatch._CAN_USE_SAGE_ATTN:
        pytest.skip("sageattention is installed here")
    assert "sageattention>=" in str(AttentionBackend(backend="sage").refusal(described(tiny_flux()), card()))


def test_quality_is_that_of_the_backend() -> None:
    assert AttentionBackend(backend="sage_varlen").quality == "lossy"
    assert AttentionBackend(backend="_native_math").quality == "near_lossless"


@pytest.mark.parametrize("cls", EXECUTIONS)
def test_every_setting_can_be_written_and_read(cls: Any) -> None:
    for setting in (cls(), *cls.variants(described(tiny_unet(), "unet"), METAL)):
        assert parse_setting(cls.axis, format_setting(setting)) == setting
    assert cls().unknown == "" or len(cls().unknown) > 20


def kernel_state(module: torch.nn.Module) -> list[KernelState]:
    return [KernelState.of(child) for child in module.modules()]


@pytest.mark.parametrize("cls", EXECUTIONS)
def test_code_and_applying_leave_the_same(cls: Any) -> None:
    pipes = [Pipe(transformer=tiny_unet() if cls is AttentionSlicing else tiny_flux()) for _ in range(2)]
    setting = AttentionBackend(backend="_native_math") if cls is AttentionBackend else cls()
    before, active = kernel_state(pipes[0].components["transformer"]), Registry._active_backend
    setting.apply(pipes[0], ["transformer"], "cpu")
    exec("\n".join(setting.code(["transformer"], "cpu")), {"pipe": pipes[1]})
    applied_, coded = (kernel_state(pipe.components["transformer"]) for pipe in pipes)
    assert [(type(s.compiled), type(s.processor), s.backend) for s in applied_] == [
        (type(s.compiled), type(s.processor), s.backend) for s in coded
    ]
    assert kernel_state(pipes[0].components["transformer"]) != before
    assert Registry._active_backend is active  # nothing is set for other models of the process


def test_the_order_is_weights_attention_hooks_residents_and_compiling() -> None:
    hooks, casting = SequentialCpuOffload(), LayerwiseCasting()
    execution = {"transformer": (CompileRepeatedBlocks(), AttentionBackend())}
    order = [setting for setting, _ in grouped({"vae": Resident(), "transformer": hooks}, {"a": casting}, execution)]
    assert order == [casting, AttentionBackend(), hooks, Resident(), CompileRepeatedBlocks()]


def test_compiled_blocks_exclude_hooks_that_the_compiler_would_trace() -> None:
    placement = SequentialCpuOffload()
    assert str(CompileRepeatedBlocks().conflict_with(placement)).startswith(placement.name)
    assert CompileRepeatedBlocks().conflict_with(WeightStreaming(streamed=3)) is None
    assert CompileRepeatedBlocks().conflict_with(Resident()) is None


# --- on a live pipeline and back -------------------------------------------------------------------------


def applied(pipe: Any, work: Any, **settings: str) -> Any:
    size = {"height": work.height, "width": work.width}
    told = {key.replace("__", "."): value for key, value in settings.items()}
    plan = vramplan.plan(pipe, device=CUDA, settings=told, simulate=False, **size)
    return plan, vramplan.apply_plan(pipe, plan, device="cpu")


def test_slicing_by_hand_is_applied_planned_for_and_undone() -> None:
    pipe, work = FAMILIES["sdxl-image-to-image"].make(), FAMILIES["sdxl-image-to-image"].workload
    before = kernel_state(pipe.unet)
    plan, done = applied(pipe, work, placement="resident", attention__unet="attention_slicing:size=max")
    assert plan.settings.attention == {"unet": "attention_slicing:size=max"}
    assert plan.quality == "near_lossless"
    assert {type(p).__name__ for p in pipe.unet.attn_processors.values()} == {"SlicedAttnProcessor"}
    assert 'pipe.unet.set_attention_slice("max")' in done.calls
    done.undo()
    assert kernel_state(pipe.unet) == before


def test_a_backend_is_set_on_the_denoiser_alone_and_undone() -> None:
    pipe, work = FAMILIES["flux-fill"].make(), FAMILIES["flux-fill"].workload
    active = Registry._active_backend
    settings = {"placement": "resident", "attention__transformer": "attention_backend:backend=_native_math"}
    plan, done = applied(pipe, work, **settings)
    backends = {p._attention_backend.value for p in pipe.transformer.attn_processors.values()}
    assert backends == {"_native_math"}
    assert Registry._active_backend is active
    assert any("attention backend _native_math" in note for note in plan.notes)
    done.undo()
    assert {p._attention_backend for p in pipe.transformer.attn_processors.values()} == {None}


def test_an_attention_setting_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, work = FAMILIES["flux-fill"].make(), FAMILIES["flux-fill"].workload
    before = kernel_state(pipe.transformer)
    settings = {"placement": "resident", "attention.transformer": "attention_backend:backend=_native_math"}
    size = {"height": work.height, "width": work.width}
    plan = vramplan.plan(pipe, device=CUDA, settings=settings, simulate=False, **size)
    monkeypatch.setattr(Resident, "apply", lambda *args: (_ for _ in ()).throw(RuntimeError("no room")))
    with pytest.raises(RuntimeError, match="no room"):
        vramplan.apply_plan(pipe, plan, device="cpu")
    assert kernel_state(pipe.transformer) == before


def test_compiling_beside_sequential_offload_is_refused_with_the_reason() -> None:
    pipe, work = FAMILIES["flux-fill"].make(), FAMILIES["flux-fill"].workload
    settings = {"placement": "sequential_cpu_offload", "compile.transformer": "compile_repeated_blocks"}
    size = {"height": work.height, "width": work.width}
    with pytest.raises(vramplan.UsageError, match="nothing is left to compile together"):
        vramplan.plan(pipe, device=CUDA, settings=settings, simulate=False, **size)


def test_compiled_blocks_compute_the_same_and_are_given_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Dynamo and AOTAutograd, whole blocks as one graph; with VRAMPLAN_TESTS=all Inductor compiles C++ too."""
    if os.environ.get("VRAMPLAN_TESTS") != "all" or shutil.which("g++") is None:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    flux = tiny_flux()
    made = torch.Generator().manual_seed(1)
    given = {
        "hidden_states": torch.randn(1, 16, 4, generator=made),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=made),
        "pooled_projections": torch.randn(1, 32, generator=made),
        "timestep": torch.ones(1),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "return_dict": False,
    }
    before = kernel_state(flux)
    with torch.no_grad():
        plain = flux(**given)[0]
        CompileRepeatedBlocks().apply(Pipe(transformer=flux), ["transformer"], "cpu")
        assert flux.transformer_blocks[0]._compiled_call_impl is not None
        torch.testing.assert_close(flux(**given)[0], plain, rtol=1e-4, atol=1e-5)
        for state, module in zip(before, flux.modules(), strict=True):
            state.restore(module)
        assert torch.equal(flux(**given)[0], plain)
    torch._dynamo.reset()


# --- what the planner makes of it ------------------------------------------------------------------------


def test_slicing_is_tried_only_where_attention_holds_scores() -> None:
    class Spec:
        components = (component("unet"),)

    both = [{"unet": (AttentionSlicing(size=size),)} for size in ("auto", "max")]
    assert execution_settings(Spec(), Fixed(), METAL) == both  # type: ignore[arg-type]
    assert execution_settings(Spec(), Fixed(), TURING) == both  # type: ignore[arg-type] # bfloat16
    assert execution_settings(Spec(), Fixed(), card()) == []  # type: ignore[arg-type]
    assert execution_settings(Spec(), Fixed(executions={"attention": {}}), METAL) == []  # type: ignore[arg-type]


def attention_peak(dtype: torch.dtype = torch.float16, **kernels: Any) -> int:
    ledger = Ledger(CachingAllocator())
    engine = Engine(ledger, Kernels(cublas_bytes=0, **kernels))
    with simulated_devices(engine):
        query, key, value = (torch.empty((1, 4, 1024, 64), dtype=dtype, device="cuda:0") for _ in range(3))
        before = ledger.allocator.peak_allocated_bytes
        made = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        assert made.shape == query.shape
    return ledger.allocator.peak_allocated_bytes - before


def test_scores_are_held_where_no_kernel_is_fused() -> None:
    scores = 4 * 1024 * 1024
    assert attention_peak() < scores
    assert attention_peak(fused_attention=False) > 2 * scores
    assert attention_peak(math_dtypes=("bfloat16",)) < scores
    by_steps = attention_peak(torch.bfloat16, math_dtypes=("bfloat16",))
    assert by_steps > 2 * 4 * scores  # float32, and their softmax beside them


@pytest.mark.parametrize(("accelerator", "falls"), [(METAL, True), (card(8 * GIB), False)])
def test_slicing_lowers_the_peak_only_where_scores_are_held(accelerator: Accelerator, falls: bool) -> None:
    from vramplan.pipeline.describe import describe
    from vramplan.simulator.model import SimulatedModel

    pipe, work = FAMILIES["sdxl-image-to-image"].make(), FAMILIES["sdxl-image-to-image"].workload
    source = SimulatedModel(describe(pipe).spec)
    placed: Any = [(AttentionSlicing(size="max"), ["unet"])]
    whole, sliced = (source.run(work, item, [], accelerator=accelerator) for item in ([], placed))
    peaks = [max(use.need_bytes for use in found.uses if use.phase == "denoise") for found in (whole, sliced)]
    assert (peaks[1] < peaks[0]) == falls
