"""torchao: weighs what the real library makes, runs under every placement that is not refused, and is never undone."""

from __future__ import annotations

import copy
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from make_pipeline import build

import vramplan
from tests.support.calls import call_kwargs, output_tensor
from vramplan.errors import UsageError, VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.build import weightless_copy
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.geometry import module_bytes
from vramplan.pipeline.live import spec_from_pipeline
from vramplan.pipeline.modules import modules_of
from vramplan.pipeline.packed_linear import PackedLinear
from vramplan.simulator.alternatives import converted_copy
from vramplan.strategies import PLACEMENTS
from vramplan.strategies.settings import format_setting
from vramplan.strategies.torchao import Torchao
from vramplan.units import GIB

pytest.importorskip("torchao")

CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))
CPU = Accelerator(kind="mps", index=0, name="cpu", total_bytes=8 * GIB, free_bytes=None)
SIZE = {"height": 64, "width": 64}
SMALL = {"sdxl-small": "unet", "flux-small": "transformer", "cogvideox-small": "transformer"}
BOTH = ["int8", "float8"]


def small(kind: str = "flux-small") -> Any:
    pipe = build(kind)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quantized(module: torch.nn.Module, setting: Torchao) -> torch.nn.Module:
    """A live copy that the real library has quantized."""
    live = copy.deepcopy(module)
    setting.apply(SimpleNamespace(components={"part": live}), ["part"], "cpu")
    return live


def planned(pipe: Any, placement: str, **settings: str) -> Any:
    told = {"weights.transformer": "torchao", "placement.transformer": placement} | settings
    return vramplan.plan(pipe, device=MACHINE, settings=told, simulate=False, **SIZE)


@pytest.mark.diagonal("dtype", "type_")
@pytest.mark.parametrize("type_", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SMALL)
def test_the_stand_ins_weigh_what_torchao_makes(kind: str, dtype: torch.dtype, type_: Any) -> None:
    setting = Torchao(type=type_)
    for name, module in modules_of(small(kind)).items():
        if name not in (SMALL[kind], "text_encoder"):
            continue
        module.to(dtype)
        real = quantized(module, setting)
        light = converted_copy(module, setting)
        assert module_bytes(light) == module_bytes(real) < module_bytes(module)
        assert module_bytes(weightless_copy(real)) == module_bytes(real)
        ours, theirs = describe_component(name, light), describe_component(name, real, live=True)
        assert ours.geometry == theirs.geometry
        assert ours.quantized == theirs.quantized == setting.quantized
        assert theirs.dtype == str(dtype).removeprefix("torch.")
        assert theirs.parameter_count == describe_component(name, module).parameter_count


@pytest.mark.parametrize("type_", BOTH)
@pytest.mark.parametrize("bias", [True, False])
def test_a_stand_in_takes_no_other_inputs_and_gives_no_other_outputs(type_: Any, bias: bool) -> None:
    plain = torch.nn.Linear(48, 24, bias=bias, dtype=torch.bfloat16)
    real = quantized(torch.nn.Sequential(plain), Torchao(type=type_))
    light = converted_copy(torch.nn.Sequential(plain), Torchao(type=type_))
    assert isinstance(light[0], PackedLinear)
    assert isinstance(light[0], torch.nn.Linear)
    assert light[0].weight.dtype == real[0].weight.dtype
    for shape in ((48,), (3, 48), (2, 3, 48)):
        given = torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) > 1:
            assert light(given.to("meta")).shape == real(given).shape
            assert light(given.to("meta")).dtype == real(given).dtype


def placements() -> list[Any]:
    spec = spec_from_pipeline(small())
    part = spec.component("transformer")
    found = []
    for cls in PLACEMENTS:
        for setting in cls.variants(part):
            if not cls.whole_pipeline and setting.refusal(part, spec, CPU) is None:
                found.append(setting)
    return found


@cache
def resident_output(type_: str) -> torch.Tensor:
    pipe = small()
    resident = planned(pipe, "resident", **{"weights.transformer": f"torchao:type={type_}"})
    vramplan.apply_plan(pipe, resident, device="cpu")
    return output_tensor(pipe(**call_kwargs("flux-small")))


@pytest.mark.parametrize("type_", BOTH)
@pytest.mark.parametrize("setting", placements(), ids=format_setting)
def test_under_every_placement_it_computes_what_it_does_resident(setting: Any, type_: Any) -> None:
    expected, other = resident_output(type_), small()
    plain = output_tensor(other(**call_kwargs("flux-small")))
    plan = planned(other, format_setting(setting), **{"weights.transformer": f"torchao:type={type_}"})
    vramplan.apply_plan(other, plan, device="cpu")
    for _ in range(2):
        assert torch.equal(output_tensor(other(**call_kwargs("flux-small"))), expected)
    assert not torch.equal(expected, plain)
    assert torch.allclose(expected, plain, atol=0.2)


def test_under_model_offload_it_computes_what_it_does_resident() -> None:
    pipe, other = small(), small()
    vramplan.apply_plan(pipe, planned(pipe, "resident"), device="cpu")
    settings = {"weights.transformer": "torchao", "placement": "model_cpu_offload"}
    plan = vramplan.plan(other, device=MACHINE, settings=settings, simulate=False, **SIZE)
    vramplan.apply_plan(other, plan, device="cpu")
    expected = output_tensor(pipe(**call_kwargs("flux-small")))
    assert torch.equal(output_tensor(other(**call_kwargs("flux-small"))), expected)


@pytest.mark.parametrize("type_", BOTH)
def test_accelerate_offloads_its_tensors_leaf_by_leaf(type_: Any) -> None:
    """What sequential offload calls for each component; the pipeline's own call needs another device."""
    from accelerate import cpu_offload

    module = quantized(modules_of(small())["text_encoder"], Torchao(type=type_))
    ids = torch.arange(1, 8).unsqueeze(0)
    expected = module(ids).last_hidden_state
    cpu_offload(module, torch.device("cpu"))
    assert module.encoder.layers[0].mlp.fc1.weight.is_meta
    assert torch.equal(module(ids).last_hidden_state, expected)


def test_files_cannot_hold_its_tensors() -> None:
    with pytest.raises(UsageError, match="cannot be written to safetensors files: leave disk out"):
        planned(small(), "group_offload:disk=true")
    pipe = small()
    Torchao().apply(pipe, ["transformer"], "cpu")
    with pytest.raises(ValueError, match="Disk offloading is not supported for TorchAO"):
        pipe.transformer.enable_group_offload(
            torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path="/nowhere"
        )


def forms(pipe: Any, allow: Any) -> set[str]:
    from vramplan.planner.candidates import weight_settings
    from vramplan.planner.fixed import parse_fixed

    spec = spec_from_pipeline(pipe)
    found = weight_settings(spec, parse_fixed({}, spec), allow)
    return {format_setting(setting) for form in found for setting in form.values()}


def test_weights_are_rounded_no_more_than_is_allowed() -> None:
    pipe = small()
    assert forms(pipe, None) == forms(pipe, "lossless") == set()
    assert forms(pipe, "near_lossless") == {"torchao"}
    assert forms(pipe, "lossy") == {"torchao", "layerwise_casting"}


def test_large_text_encoders_are_rounded_with_the_denoiser_or_not_at_all() -> None:
    from vramplan.pipeline.describe import describe
    from vramplan.planner.candidates import weight_settings
    from vramplan.planner.fixed import parse_fixed

    spec = describe("flux.1-dev").spec
    found = weight_settings(spec, parse_fixed({}, spec), "near_lossless")
    assert [set(form) for form in found] == [{"transformer"}, {"transformer", "text_encoder_2"}]


def test_it_is_not_undone_and_holds_no_weights_of_before() -> None:
    import gc
    import weakref

    pipe = small()
    before = weakref.ref(pipe.transformer.proj_out.weight)
    plan = planned(pipe, "resident")
    assert (plan.quality, plan.settings.weights) == ("near_lossless", {"transformer": "torchao"})
    applied = vramplan.apply_plan(pipe, plan, device="cpu")
    gc.collect()
    assert before() is None
    assert "quantize_(pipe.transformer, Int8WeightOnlyConfig())" in applied.calls
    assert vramplan.apply_plan(pipe, plan, device="cpu") is applied
    with pytest.raises(VramplanError, match="torchao has rounded weights, which cannot be undone"):
        applied.undo()


def test_the_code_does_what_applying_does() -> None:
    pipe, other = small(), small()
    Torchao(type="float8").apply(pipe, ["transformer"], "cpu")
    exec("\n".join(Torchao(type="float8").code(["transformer"], "cpu")), {"pipe": other})
    assert module_bytes(other.transformer) == module_bytes(pipe.transformer)


def test_what_is_quantized_already_is_planned_as_it_is() -> None:
    pipe = small()
    stored = spec_from_pipeline(pipe).component("transformer")
    Torchao().apply(pipe, ["transformer"], "cpu")
    plan = vramplan.plan(pipe, device=MACHINE, allow="lossy", **SIZE)
    assert plan.projected.basis == "simulated"
    record = next(item for item in plan.model.components if item.name == "transformer")
    assert record.weight_bytes == module_bytes(pipe.transformer) < stored.weight_bytes
    assert all("transformer" not in item.settings.weights for item in plan.candidates)
    denoise = next(phase for phase in plan.projected.phases if phase.name == "denoise")
    held = sum(item.weight_bytes for item in plan.model.components)
    assert held <= denoise.weights_bytes < held + stored.weight_bytes
    for text in ("torchao", "torchao:type=float8", "layerwise_casting", "bitsandbytes"):
        with pytest.raises(UsageError, match=r"are quantized already \(torchao int8\)"):
            planned(pipe, "resident", **{"weights.transformer": text})
    applied = vramplan.apply_plan(pipe, plan, device="cpu")
    expected = output_tensor(pipe(**call_kwargs("flux-small")))
    applied.undo()
    assert torch.equal(output_tensor(pipe(**call_kwargs("flux-small"))), expected)


def test_on_top_of_layerwise_casting_it_is_refused() -> None:
    pipe = small()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(UsageError, match="are cast by layerwise casting already"):
        planned(pipe, "resident")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("transformer", "torchao:type=int4", "packs int4 weights only on a GPU"),
        ("transformer", "torchao:type=int2", "use one of int8, float8, int4"),
    ],
)
def test_what_cannot_be_is_one_clear_line(name: str, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        vramplan.plan(small(), device=MACHINE, settings={f"weights.{name}": text}, **SIZE)


def test_without_the_package_it_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vramplan.strategies.base.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="torchao is not installed: pip install torchao"):
        planned(small(), "resident")
