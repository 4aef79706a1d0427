"""A pipeline that is changed after a plan was applied: the plan is made anew, and undone the same way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calls import call_kwargs, output_tensor
from make_pipeline import build

import vramplan
import vramplan.apply
from vramplan.apply import applied_to
from vramplan.errors import NothingFitsError, VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.component import hooks_of
from vramplan.pipeline.live import modules_of
from vramplan.units import GIB

CARD = Accelerator(kind="cuda", index=0, name="made-up card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))
HEADS = {"sd15-small": "unet", "sdxl-small": "unet", "flux-small": "transformer"}
PLACEMENTS = {
    "resident": "resident",
    "model": "model_cpu_offload",
    "leaf": "group_offload:type=leaf",
    "block": "group_offload:blocks=1",
    "partial": "partial_residency:streamed=3",
    "disk": "group_offload:disk=true",
    "partial disk": "partial_residency:streamed=3,disk=true",
}


@pytest.fixture(autouse=True)
def _card(monkeypatch, tmp_path):
    """The CPU stands in for the card; what needs streams does without them there."""
    monkeypatch.setenv("VRAMPLAN_OFFLOAD", str(tmp_path / "offload"))
    monkeypatch.setattr(vramplan.apply, "planned_accelerator", lambda plan, device: plan.machine.accelerator)


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


class TestWithoutPeft:
    def test_a_component_that_was_exchanged_is_planned_for(self):
        pipe, first = with_plan("flux-small", "group_offload:blocks=1")
        other = small("flux-small").vae.to(torch.float64)
        with vramplan.changing(pipe, simulate=False):
            pipe.vae = other
        now = applied_to(pipe)
        assert now is not first
        assert {part.name: part.dtype for part in now.plan.model.components}["vae"] == "float64"
        assert now.plan.workload == first.plan.workload

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
