"""bitsandbytes: stand-ins weigh what its own modules do, plans load it, and a live pipeline is refused.

There is no accelerator here, and diffusers quantizes no model of its own without one (0.42, `validate_environment`).
What is real: bitsandbytes' modules on the CPU, and a text encoder that transformers loads with it.
"""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from make_pipeline import build

import vramplan
from vramplan.api.code import plan_code
from vramplan.errors import UsageError, VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.build import weightless_copy
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.geometry import module_bytes
from vramplan.pipeline.modules import modules_of
from vramplan.planfile.match import check_match, parse_settings
from vramplan.runtime.load import assemble_pipeline, load_component, load_components
from vramplan.runtime.staged import load_applied, load_stages
from vramplan.simulator.alternatives import converted_copy
from vramplan.strategies.bitsandbytes import Bitsandbytes
from vramplan.units import GIB

bnb = pytest.importorskip("bitsandbytes")

CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))
SIZE = {"height": 64, "width": 64}
BOTH = ["nf4", "int8"]


def quantized_layer(linear: torch.nn.Linear, type_: str) -> torch.nn.Module:
    """The library's own module, quantized as loading does: when it is moved."""
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if type_ == "nf4":
        made = bnb.nn.Linear4bit(*sizes, compute_dtype=linear.weight.dtype, quant_type="nf4", compress_statistics=False)
        made.weight = bnb.nn.Params4bit(linear.weight.data, False, quant_type="nf4", compress_statistics=False)
    else:
        made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        made.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = linear.bias
    return made.to("cpu").eval()


def quantized(module: torch.nn.Module, type_: str) -> torch.nn.Module:
    """A live copy in which bitsandbytes' modules stand where diffusers puts them."""
    from diffusers.quantizers.bitsandbytes.utils import _replace_with_bnb_linear
    from transformers import BitsAndBytesConfig

    live = copy.deepcopy(module)
    config = BitsAndBytesConfig(load_in_4bit=True) if type_ == "nf4" else BitsAndBytesConfig(load_in_8bit=True)
    replaced, _ = _replace_with_bnb_linear(copy.deepcopy(module), [], [], config)
    for path, layer in replaced.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            parent, _, name = path.rpartition(".")
            setattr(live.get_submodule(parent), name, quantized_layer(live.get_submodule(path), type_))
    return live


@pytest.mark.diagonal("kind", "type_")
@pytest.mark.parametrize("type_", BOTH)
@pytest.mark.parametrize("kind", ["flux-small", "sdxl-small"])
def test_the_stand_ins_weigh_what_bitsandbytes_makes(kind: str, type_: Any) -> None:
    setting = Bitsandbytes(type=type_)
    name = "unet" if kind == "sdxl-small" else "transformer"
    module = modules_of(build(kind))[name].to(torch.bfloat16)
    real, light = quantized(module, type_), converted_copy(module, setting)
    assert module_bytes(light) == module_bytes(real) < module_bytes(module)
    assert module_bytes(weightless_copy(real)) == module_bytes(real)
    ours, theirs = describe_component(name, light), describe_component(name, real, live=True)
    assert ours.quantized == theirs.quantized == setting.quantized
    assert ours.geometry.blocks == theirs.geometry.blocks
    assert theirs.dtype == "bfloat16"
    assert theirs.parameter_count == describe_component(name, module).parameter_count


@pytest.mark.parametrize("type_", BOTH)
def test_the_stand_ins_leave_a_module_its_dtype(type_: Any) -> None:
    """Pipelines cast their inputs to it: FLUX.1 to float32 where scales are taken for parameters: they come first."""
    module = modules_of(build("flux-small"))["transformer"].to(torch.bfloat16)
    real, light = quantized(module, type_), converted_copy(module, Bitsandbytes(type=type_))
    assert light.dtype == real.dtype == weightless_copy(real).dtype == torch.bfloat16


@pytest.mark.parametrize("type_", BOTH)
def test_running_once_does_not_change_what_it_weighs(type_: Any) -> None:
    """The first forward of Linear8bitLt moves its scales from the weight to the module; Linear4bit packs them anew
    where the CPU has AVX512 for bfloat16, which is switched off here."""
    layer = quantized_layer(torch.nn.Linear(64, 32, dtype=torch.bfloat16), type_)
    before = module_bytes(layer)
    given = torch.ones((2, 64), dtype=torch.bfloat16)
    layer.support_avx512bf16_for_cpu = False
    made = layer(given)
    assert module_bytes(layer) == before
    light = weightless_copy(torch.nn.Sequential(layer))
    assert light(given.to("meta")).shape == made.shape
    assert light(given.to("meta")).dtype == made.dtype


def folder_plan(folder: Path, **settings: str) -> Any:
    told = {"placement": "resident"} | settings
    return vramplan.plan(folder, device=MACHINE, dtype="bf16", settings=told, simulate=False, **SIZE)


def load_pipeline(plan: Any, folder: Path) -> Any:
    """The plan's pipeline as it is loaded, before anything is placed."""
    stages = load_stages(plan, folder, "cpu")
    modules = {
        part.name: load_component(
            folder,
            part.name,
            part.library,
            part.class_name,
            dtype=part.dtype,
            device=None,
            options=stages.options(part.name),
        )
        for part in stages.spec.components
    }
    return assemble_pipeline(folder, modules)


@pytest.mark.parametrize("type_", BOTH)
def test_a_text_encoder_is_loaded_quantized_and_the_plan_applied_to_it(
    type_: str, small_folder: Any, tmp_path: Path
) -> None:
    folder = small_folder("flux-small")
    plan = folder_plan(folder, **{"weights.text_encoder_2": f"bitsandbytes:type={type_}"})
    pipe = load_pipeline(plan, folder)
    kind = bnb.nn.Linear4bit if type_ == "nf4" else bnb.nn.Linear8bitLt
    replaced = {path for path, layer in pipe.text_encoder_2.named_modules() if isinstance(layer, kind)}
    assert replaced
    assert not any(isinstance(layer, kind) for layer in pipe.transformer.modules())
    plain = load_pipeline(folder_plan(folder), folder).text_encoder_2
    light = converted_copy(plain, Bitsandbytes(type=type_))
    assert {path for path, layer in light.named_modules() if hasattr(layer, "quantized")} == replaced
    assert module_bytes(light) == module_bytes(pipe.text_encoder_2)
    if type_ == "nf4":
        applied = vramplan.apply_plan(pipe, plan, device="cpu")
        ids = torch.arange(1, 8).unsqueeze(0)
        assert torch.isfinite(pipe.text_encoder_2(ids).last_hidden_state).all()
        assert applied.undo() is pipe


def test_a_pipeline_loaded_otherwise_is_not_what_was_planned(small_folder: Any) -> None:
    from vramplan.errors import MismatchError
    from vramplan.pipeline.live import spec_from_pipeline

    folder = small_folder("flux-small")
    nf4 = folder_plan(folder, **{"weights.text_encoder_2": "bitsandbytes"})
    loaded = spec_from_pipeline(load_pipeline(nf4, folder))
    check_match(loaded, nf4)
    placed, _ = parse_settings(nf4, loaded, CARD)
    assert all(setting.axis == "placement" for setting, _ in placed)
    with pytest.raises(MismatchError, match="text_encoder_2: the plan is for"):
        check_match(loaded, folder_plan(folder))
    unquantized = spec_from_pipeline(load_pipeline(folder_plan(folder), folder))
    with pytest.raises(UsageError, match="load it with `vramplan apply`"):
        parse_settings(nf4, unquantized, CARD)


def test_each_library_gets_its_own_configuration(small_folder: Any) -> None:
    import diffusers
    import transformers

    folder = small_folder("flux-small")
    names = {"weights.transformer": "bitsandbytes:type=int8", "weights.text_encoder_2": "bitsandbytes"}
    plan = folder_plan(folder, **names)
    stages = load_stages(plan, folder, "cpu")
    mapping = {name: stages.options(name)["quantization_config"] for name in ("transformer", "text_encoder_2")}
    assert stages.options("vae") == {}
    assert type(mapping["transformer"]) is diffusers.BitsAndBytesConfig
    assert mapping["transformer"].load_in_8bit
    assert type(mapping["text_encoder_2"]) is transformers.BitsAndBytesConfig
    assert mapping["text_encoder_2"].bnb_4bit_quant_type == "nf4"
    assert mapping["text_encoder_2"].bnb_4bit_compute_dtype is torch.bfloat16  # not float32, its default
    assert plan.quality == "lossy"
    code = plan_code(plan)
    scope = {"torch": torch, "diffusers": diffusers, "transformers": transformers}
    coded = {}
    for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if "quantization_config" in given:
            name = ast.literal_eval(given["subfolder"])
            coded[name] = eval(ast.unparse(given["quantization_config"]), scope)
    assert {name: item.to_dict() for name, item in coded.items()} == {
        name: item.to_dict() for name, item in mapping.items()
    }


@pytest.mark.parametrize(("placement", "returns"), [("model_cpu_offload", True), ("resident", False)])
def test_what_is_quantized_on_the_device_leaves_it_before_the_next_is_loaded(
    placement: str, returns: bool, small_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all packed components are there together while a plan with model offload is loaded (FLUX.1: 10 GiB)."""
    done: list[tuple[str, ...]] = []

    class Module(torch.nn.Module):
        def to(self, device: str) -> Any:
            done.append((self.name, device))
            return self

    def load(folder: Path, name: str, *_: Any, **options: Any) -> torch.nn.Module:
        done.append((name,))
        module = Module()
        module.name = name
        return module

    monkeypatch.setattr("vramplan.runtime.load.load_component", load)
    folder = small_folder("flux-small")
    weights = {f"weights.{name}": "bitsandbytes" for name in ("transformer", "text_encoder_2")}
    plan = folder_plan(folder, placement=placement, **weights)
    stages = load_stages(plan, folder, "cpu")
    assert stages.returns("transformer") is returns
    load_components(folder, stages, stages.rest, "cpu", say=lambda _: None)
    order = [step for step in done if step[0] in ("transformer", "text_encoder_2")]
    names = [name for name in stages.rest if f"weights.{name}" in weights]
    assert order == [step for name in names for step in ((name,), (name, "cpu"))]  # resident ones go to this device too
    assert plan_code(plan).count('.to("cpu")') == 2 * returns


def test_without_an_accelerator_diffusers_says_why(small_folder: Any) -> None:
    if torch.cuda.is_available() or torch.xpu.is_available() or torch.mps.is_available():
        pytest.skip("there is an accelerator")
    folder = small_folder("flux-small")
    plan = folder_plan(folder, **{"weights.transformer": "bitsandbytes"})
    with pytest.raises(VramplanError, match=r"transformer: .* A GPU is needed for quantization"):
        load_applied(plan, folder, None, device="cpu", say=print)


def test_offloading_parts_of_it_by_diffusers_is_refused(small_folder: Any) -> None:
    settings = {"weights.transformer": "bitsandbytes", "placement.transformer": "group_offload:type=leaf"}
    with pytest.raises(UsageError, match="which group offloading does not move along"):
        vramplan.plan(small_folder("flux-small"), device=MACHINE, settings=settings, simulate=False, **SIZE)


def test_group_offloading_leaves_its_scales_behind() -> None:
    """The reason for that refusal: diffusers sets `data` of parameters and buffers: the scales are no part of it."""
    layer = quantized_layer(torch.nn.Linear(64, 32), "nf4")
    assert [name for name, _ in (*layer.named_parameters(), *layer.named_buffers())] == ["weight", "bias"]
    scales = layer.weight.quant_state.absmax
    layer.weight.data = layer.weight.data.clone()  # what ModuleGroup._transfer_tensor_to_device does, with `to`
    assert layer.weight.quant_state.absmax is scales


def test_8_bits_stay_on_the_device_when_their_module_is_moved() -> None:
    """The reason why it is not moved: torch sets `data` (`Module._apply`), and the layer keeps its codes elsewhere too.

    Only the layer's own `to` moves those; a module that contains it never calls that.
    """
    layer = quantized_layer(torch.nn.Linear(64, 32), "int8")
    codes = layer.weight.CB
    layer.weight.data = layer.weight.data.clone()
    assert layer.weight.CB is codes  # before the first call
    layer(torch.ones(2, 64))
    layer.weight.data = layer.weight.data.clone()
    assert layer.state.CB is codes  # and after it
    assert "to" in vars(type(layer))
    assert "_apply" not in vars(type(layer))


def test_a_live_pipeline_is_refused_with_the_way_to_go() -> None:
    with pytest.raises(UsageError, match="plan for its folder and load it with `vramplan apply`"):
        vramplan.plan(build("flux-small"), device=MACHINE, settings={"weights.transformer": "bitsandbytes"}, **SIZE)


def test_without_the_package_it_is_refused_with_the_command(small_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_folder("flux-small")
    plan = folder_plan(folder, **{"weights.transformer": "bitsandbytes"})
    monkeypatch.setattr("vramplan.strategies.base.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="bitsandbytes is not installed: pip install bitsandbytes"):
        folder_plan(folder, **{"weights.transformer": "bitsandbytes"})
    with pytest.raises(UsageError, match="bitsandbytes is not installed"):
        load_pipeline(plan, folder)
