"""`vramplan.auto_configure(pipe)`: the one call in place of the manual ones."""

from __future__ import annotations

import pytest
import torch
from make_pipeline import SMALL_KINDS

import vramplan
from tests.support.calls import call_kwargs, output_tensor
from vramplan.errors import MismatchError, NothingFitsError, UsageError, VramplanError
from vramplan.hardware.types import Hardware, Host
from vramplan.pipeline.component import hooks_of
from vramplan.pipeline.modules import modules_of
from vramplan.runtime.applied import applied_to
from vramplan.units import GIB

BARE = Hardware(accelerators=(), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch):
    """Whatever this machine has: one without a card, and with 30 GiB of free RAM."""
    monkeypatch.setattr("vramplan.api.machine.detect", lambda: BARE)


def sizes(kind):
    names = ("height", "width", "num_frames", "num_inference_steps")
    return {name: value for name, value in call_kwargs(kind).items() if name in names}


def output(pipe, kind):
    return output_tensor(pipe(**call_kwargs(kind)))


@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_it_returns_the_plan_it_applied_and_changes_no_bit(small_pipeline, kind):
    pipe = small_pipeline(kind)
    before = output(pipe, kind)
    plan = vramplan.auto_configure(pipe, **sizes(kind))
    assert isinstance(plan, vramplan.Plan)
    assert applied_to(pipe).plan is plan
    assert plan.machine.device == "cpu"
    assert set(plan.settings.placement) == set(modules_of(pipe))
    assert torch.equal(output(pipe, kind), before)


def test_the_cogvideox_example_of_the_documentation_gives_the_same_video(small_pipeline):
    """Instead of enable_model_cpu_offload, enable_sequential_cpu_offload, enable_slicing and enable_tiling."""
    from diffusers import CogVideoXDPMScheduler

    def loaded():
        pipe = small_pipeline("cogvideox-small")
        pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        return pipe

    untouched, configured = loaded(), loaded()
    plan = vramplan.auto_configure(configured, **sizes("cogvideox-small"))
    assert plan.quality == "lossless"
    assert type(configured.scheduler) is CogVideoXDPMScheduler
    assert torch.equal(output(configured, "cogvideox-small"), output(untouched, "cogvideox-small"))


def test_it_takes_the_names_of_the_pipelines_own_call(small_pipeline):
    pipe = small_pipeline("sd15-small")
    plan = vramplan.auto_configure(pipe, height=72, width=64, num_images_per_prompt=2, num_inference_steps=3)
    work = plan.workload
    assert (work.height, work.width, work.num_images_per_prompt, work.num_inference_steps) == (72, 64, 2, 3)


def test_left_out_sizes_are_the_pipelines_own(small_pipeline):
    pipe = small_pipeline("cogvideox-small")
    work = vramplan.auto_configure(pipe).workload
    assert (work.height, work.width, work.num_frames) == (96, 80, 9)


def test_settings_fixed_by_hand_are_kept(small_pipeline):
    pipe = small_pipeline("sd15-small")
    plan = vramplan.auto_configure(pipe, settings={"decode": "vae_slicing"}, **sizes("sd15-small"))
    assert plan.settings.decode == ("vae_slicing",)
    assert pipe.vae.use_slicing is True


def test_calling_it_again_replaces_what_it_did(small_pipeline):
    pipe = small_pipeline("sd15-small")
    vramplan.auto_configure(pipe, settings={"decode": "vae_slicing"}, **sizes("sd15-small"))
    second = vramplan.auto_configure(pipe, **sizes("sd15-small"))
    assert pipe.vae.use_slicing is False
    applied = applied_to(pipe)
    assert applied.plan is second
    applied.undo()
    assert "_vramplan_applied" not in pipe.__dict__


class TestRefused:
    def kept(self, pipe, error, match, **options):
        """The call is refused with the error, and the pipeline has what it had before."""
        with pytest.raises(error, match=match) as caught:
            vramplan.auto_configure(pipe, **options)
        assert "\n" not in str(caught.value)
        return caught.value

    def test_where_nothing_fits_the_earlier_plan_stays(self, small_pipeline):
        pipe = small_pipeline("sd15-small")
        vramplan.auto_configure(pipe, settings={"decode": "vae_slicing"}, **sizes("sd15-small"))
        earlier = applied_to(pipe)
        error = self.kept(pipe, NothingFitsError, "short by", ram="1MiB", **sizes("sd15-small"))
        assert error.exit_code == 3
        assert applied_to(pipe) is earlier
        assert pipe.vae.use_slicing is True
        earlier.undo()
        assert pipe.vae.use_slicing is False

    @pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
    def test_a_card_that_is_not_here_can_be_planned_for_but_not_applied(self, small_pipeline):
        pipe = small_pipeline("sd15-small")
        self.kept(pipe, MismatchError, "torch sees no accelerator", vram="8GiB", **sizes("sd15-small"))
        assert applied_to(pipe) is None
        assert not any(map(hooks_of, modules_of(pipe).values()))

    def test_a_name_that_is_no_part_of_a_workload(self, small_pipeline):
        self.kept(small_pipeline("sd15-small"), UsageError, "heigth is not part of a workload", heigth=64)

    @pytest.mark.parametrize("height", [0, -8, 64.0, True, "64"])
    def test_a_size_that_is_none(self, small_pipeline, height):
        self.kept(small_pipeline("sd15-small"), UsageError, "height must be a whole number", height=height)

    @pytest.mark.parametrize("thing", [object(), None, 3, torch.nn.Linear(2, 2)])
    def test_what_is_no_pipeline(self, thing):
        self.kept(thing, VramplanError, "is not a diffusers pipeline")


class TestPlanPrintsItself:
    def test_in_the_terminal(self, small_pipeline):
        text = str(vramplan.auto_configure(small_pipeline("sd15-small"), **sizes("sd15-small")))
        assert text.startswith("pipeline  StableDiffusionPipeline (live)")
        assert "chosen    resident" in text

    def test_in_a_notebook_as_escaped_html(self, small_pipeline):
        from dataclasses import replace

        plan = vramplan.auto_configure(small_pipeline("sd15-small"), **sizes("sd15-small"))
        html = replace(plan, reason="<b>1 & 2</b>")._repr_html_()
        assert html.startswith("<pre")
        assert "&lt;b&gt;1 &amp; 2&lt;/b&gt;" in html
