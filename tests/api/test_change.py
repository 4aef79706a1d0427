"""A pipeline that is changed after a plan was applied: the plan is made anew, and undone the same way."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
from make_pipeline import build
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import vramplan
import vramplan.runtime.applied
from tests.support.calls import call_kwargs, output_tensor
from vramplan.errors import MismatchError, NothingFitsError, VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.component import hooks_of
from vramplan.pipeline.modules import modules_of
from vramplan.runtime.applied import applied_to
from vramplan.units import GIB

CARD = Accelerator(kind="cuda", index=0, name="made-up card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))
HEADS = {"sd15-small": "unet", "sdxl-small": "unet", "flux-small": "transformer"}
PLACEMENTS = {
    "resident": "resident",
    "model": "model_cpu_offload",
    "leaf": "group_offload:type=leaf",
    "block": "group_offload:blocks=1",
    "streaming": "weight_streaming:streamed=3,keep=1,locked=2",
    "disk": "group_offload:disk=true",
}


@pytest.fixture(autouse=True)
def _card(monkeypatch, tmp_path):
    """The CPU stands in for the card; what needs streams does without them there."""
    monkeypatch.setenv("VRAMPLAN_OFFLOAD", str(tmp_path / "offload"))
    monkeypatch.setattr(vramplan.runtime.applied, "planned_accelerator", lambda plan, device: plan.machine.accelerator)


def small(kind):
    pipe = build(kind)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def output(pipe, kind):
    return output_tensor(pipe(**call_kwargs(kind)))


def with_plan(kind, text, **options):
    """A pipeline with a plan on that has this placement for the denoiser, put there by hand."""
    pipe = small(kind)
    plan = vramplan.plan(
        pipe, device=MACHINE, settings={"placement": "resident"}, simulate=False, height=64, width=64, **options
    )
    parts = plan.settings.placement
    placement = {part: text if part == HEADS[kind] or text == "model_cpu_offload" else "resident" for part in parts}
    plan = replace(plan, settings=replace(plan.settings, placement=placement))
    return pipe, vramplan.apply_plan(pipe, plan, device="cpu")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """The folder of a LoRA for each kind, with random weights."""
    peft = pytest.importorskip("peft")

    def make(kind):
        folder = tmp_path_factory.mktemp("lora")
        torch.manual_seed(1)
        pipe = small(kind)
        config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
        head = getattr(pipe, HEADS[kind])
        head.add_adapter(config)
        layers = {f"{HEADS[kind]}_lora_layers": peft.utils.get_peft_model_state_dict(head)}
        pipe.save_lora_weights(folder, **layers)
        return folder

    return make


@pytest.mark.diagonal("kind", "name")
@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("kind", HEADS)
def test_a_lora_is_charged_and_the_pictures_are_those_of_the_pipeline_alone(lora, kind, name):
    folder = lora(kind)
    alone = small(kind)
    plain = output(alone, kind)
    alone.load_lora_weights(folder)
    wanted = output(alone, kind)
    assert not torch.equal(wanted, plain)
    pipe, first = with_plan(kind, PLACEMENTS[name])
    with vramplan.changing(pipe, settings={f"placement.{HEADS[kind]}": "group_offload:type=leaf"}, simulate=False):
        assert applied_to(pipe) is None
        pipe.load_lora_weights(folder)
    now = applied_to(pipe)
    sizes = [{part.name: part.weight_bytes for part in plan.model.components} for plan in (first.plan, now.plan)]
    assert sizes[1][HEADS[kind]] > sizes[0][HEADS[kind]]
    assert hooks_of(getattr(pipe, HEADS[kind])) == ("group_offloading",)
    assert torch.equal(output(pipe, kind), wanted)
    now.undo()
    assert not any(map(hooks_of, modules_of(pipe).values()))
    assert torch.equal(output(pipe, kind), wanted)


@pytest.mark.parametrize("kind", HEADS)
def test_weights_in_files_survive_a_lora_that_is_loaded_with_the_plan_on(lora, kind, tmp_path):
    folder = lora(kind)
    alone = small(kind)
    alone.load_lora_weights(folder)
    wanted = output(alone, kind)
    pipe, first = with_plan(kind, PLACEMENTS["disk"])
    pipe.load_lora_weights(folder)
    first.undo()
    assert torch.equal(output(pipe, kind), wanted)
    assert not list((tmp_path / "offload").iterdir())


def ip_adapter(pipe, folder):
    """A small IP-Adapter for the pipeline's UNet in the file format of the published ones, its image encoder beside."""
    torch.manual_seed(2)
    size, across = 16, pipe.unet.config.cross_attention_dim
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, projection_dim=size, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    stored = {
        "image_proj.proj.weight": torch.randn(4 * across, size),
        "image_proj.proj.bias": torch.randn(4 * across),
        "image_proj.norm.weight": torch.ones(across),
        "image_proj.norm.bias": torch.zeros(across),
    }
    # numbered as diffusers 0.42 does (loaders/unet.py): by twos, in the order of the processors
    layers = [name for name in pipe.unet.attn_processors if "attn2" in name]
    for number, name in enumerate(layers):
        keys = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k
        for kind in ("k", "v"):
            stored[f"ip_adapter.{2 * number + 1}.to_{kind}_ip.weight"] = torch.randn(keys.out_features, across)
    save_file(stored, folder / "adapter.safetensors")


def load_ip_adapter(pipe, folder):
    options = {"subfolder": "", "weight_name": "adapter.safetensors", "image_encoder_folder": "image_encoder"}
    pipe.load_ip_adapter(str(folder), local_files_only=True, **options)


def output_like(pipe, kind):
    """Of a call that is given a picture besides the prompt."""
    made = torch.Generator().manual_seed(3)
    picture = Image.fromarray((torch.rand(32, 32, 3, generator=made) * 255).byte().numpy())
    return output_tensor(pipe(**call_kwargs(kind), ip_adapter_image=picture))


@pytest.mark.diagonal("kind", "name")
@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("kind", ["sd15-small", "sdxl-small"])
def test_an_ip_adapter_is_charged_and_the_pictures_are_those_of_the_pipeline_alone(kind, name, tmp_path):
    alone = small(kind)
    ip_adapter(alone, tmp_path)
    plain = output(alone, kind)
    load_ip_adapter(alone, tmp_path)
    wanted = output_like(alone, kind)
    assert not torch.equal(wanted, plain)
    pipe, first = with_plan(kind, PLACEMENTS[name])
    with vramplan.changing(pipe, settings={"placement.unet": "group_offload:type=leaf"}, simulate=False):
        load_ip_adapter(pipe, tmp_path)
    now = applied_to(pipe)
    assert now.changed is None
    sizes = [{part.name: part.weight_bytes for part in plan.model.components} for plan in (first.plan, now.plan)]
    assert sizes[1]["unet"] > sizes[0]["unet"]
    assert sizes[1]["image_encoder"] > 0
    assert "image_encoder" in now.plan.settings.placement
    assert torch.equal(output_like(pipe, kind), wanted)
    now.undo()
    assert not any(map(hooks_of, modules_of(pipe).values()))
    assert torch.equal(output_like(pipe, kind), wanted)


@pytest.mark.parametrize("name", PLACEMENTS)
class TestBehindItsBack:
    def test_an_ip_adapter_is_told_at_the_next_call(self, name, tmp_path):
        pipe, first = with_plan("sd15-small", PLACEMENTS[name])
        output(pipe, "sd15-small")
        assert first.changed is None
        ip_adapter(pipe, tmp_path)
        load_ip_adapter(pipe, tmp_path)
        assert re.match(r"unet went from \d+ to \d+ tensors since the plan was applied", first.changed)
        with pytest.raises(MismatchError, match="image_encoder is in this pipeline, not in the plan"):
            vramplan.apply_plan(pipe, first.plan, device="cpu")
        assert applied_to(pipe) is first

    def test_a_lora_is_told_and_planned_for_by_the_next_plan(self, lora, name):
        if name == "model":
            pytest.skip("diffusers refuses to put model offload on again without an accelerator")
        folder = lora("sdxl-small")
        alone = small("sdxl-small")
        alone.load_lora_weights(folder)
        pipe, first = with_plan("sdxl-small", PLACEMENTS[name])
        pipe.load_lora_weights(folder)
        assert "unet went from" in first.changed
        with pytest.warns(UserWarning, match=r"unet went from .*changing"):
            vramplan.recovering_call(pipe, call_kwargs("sdxl-small"))
        said = []
        with pytest.warns(UserWarning, match="unet"), vramplan.calibrating(pipe, say=said.append):
            vramplan.recovering_call(pipe, call_kwargs("sdxl-small"))
        assert said[0].startswith("not kept for later plans: unet went from")
        pipe.unload_lora_weights()
        assert (first.changed is None) == (not name.startswith("partial")), first.changed
        pipe.load_lora_weights(folder)
        vramplan.auto_configure(pipe, device="cpu", height=64, width=64)
        assert applied_to(pipe).changed is None
        assert torch.equal(output(pipe, "sdxl-small"), output(alone, "sdxl-small"))


@pytest.mark.diagonal("kind", "name")
@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("kind", ["sd15-small", "sdxl-small"])
def test_a_controlnet_makes_another_pipeline_which_is_planned_for_once_the_first_has_no_plan(kind, name):
    cls = {"sd15-small": StableDiffusionControlNetPipeline, "sdxl-small": StableDiffusionXLControlNetPipeline}[kind]
    alone = small(kind)
    torch.manual_seed(4)
    net = ControlNetModel.from_unet(alone.unet, conditioning_embedding_out_channels=(8, 8, 16, 16)).eval()
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight)
    picture = {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))}
    controlled = cls.from_pipe(alone, controlnet=net)
    controlled.set_progress_bar_config(disable=True)
    wanted = output_tensor(controlled(**call_kwargs(kind), **picture))
    pipe, first = with_plan(kind, PLACEMENTS[name])
    shared = cls.from_pipe(pipe, controlnet=net)
    assert applied_to(shared) is None
    if name != "resident":
        with pytest.raises(VramplanError, match="undo the plan there"):
            vramplan.auto_configure(shared, device="cpu", height=64, width=64)
    other = cls.from_pipe(first.undo(), controlnet=net)
    other.set_progress_bar_config(disable=True)
    plan = vramplan.plan(
        other, device=MACHINE, settings={"placement": "group_offload:type=leaf"}, simulate=False, height=64, width=64
    )
    assert "controlnet" in plan.settings.placement
    applied = vramplan.apply_plan(other, plan, device="cpu")
    assert torch.equal(output_tensor(other(**call_kwargs(kind), **picture)), wanted)
    applied.undo()
    assert torch.equal(output_tensor(other(**call_kwargs(kind), **picture)), wanted)


class TestWithoutPeft:
    def test_a_component_that_was_exchanged_is_planned_for(self):
        pipe, first = with_plan("flux-small", "group_offload:blocks=1", stock=True)
        other = small("flux-small").vae.to(torch.float64)
        with vramplan.changing(pipe, simulate=False):
            pipe.vae = other
        now = applied_to(pipe)
        assert now is not first
        assert {part.name: part.dtype for part in now.plan.model.components}["vae"] == "float64"
        assert now.plan.workload == first.plan.workload
        assert now.plan.asked.stock

    @pytest.mark.parametrize("name", PLACEMENTS)
    def test_what_fails_inside_leaves_the_plan_on(self, name):
        pipe, first = with_plan("flux-small", PLACEMENTS[name])
        plain = output(small("flux-small"), "flux-small")
        hooked = {part: hooks_of(module) for part, module in modules_of(pipe).items()}
        with pytest.raises(KeyboardInterrupt), vramplan.changing(pipe):
            raise KeyboardInterrupt
        assert applied_to(pipe) is first
        assert {part: hooks_of(module) for part, module in modules_of(pipe).items()} == hooked
        first.undo()
        assert torch.equal(output(pipe, "flux-small"), plain)

    def test_where_nothing_fits_any_more_the_plan_stays(self):
        pipe, first = with_plan("flux-small", "group_offload:blocks=1")
        with pytest.raises(NothingFitsError), vramplan.changing(pipe, vram="1MiB", simulate=False):
            pass
        assert applied_to(pipe) is first

    def test_a_pipeline_without_a_plan_is_refused(self):
        with pytest.raises(VramplanError, match="applied no plan"), vramplan.changing(small("sd15-small")):
            pass
