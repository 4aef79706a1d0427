"""Applying a plan to real small pipelines, and taking it off again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from make_pipeline import SMALL_KINDS

import vramplan
from tests.support.calls import call_kwargs, output_tensor
from vramplan.errors import MismatchError, UsageError, VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.component import hooks_of
from vramplan.pipeline.live import spec_from_pipeline
from vramplan.pipeline.modules import modules_of
from vramplan.planfile.file import dump_plan, parse_plan
from vramplan.planfile.types import Settings, fingerprint
from vramplan.runtime.applied import applied_to
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.model_cpu_offload import ModelCpuOffload
from vramplan.strategies.resident import Resident
from vramplan.strategies.sequential_cpu_offload import SequentialCpuOffload
from vramplan.units import GIB

CARD = Accelerator(kind="cuda", index=0, name="made-up card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))

DENOISERS = {"sd15-small": "unet", "sdxl-small": "unet", "flux-small": "transformer", "cogvideox-small": "transformer"}
# Every lossless placement that needs no streams, and mixes of them. HEAD stands for the denoiser.
LOSSLESS = {
    "resident": {"placement": "resident"},
    "model": {"placement": "model_cpu_offload"},
    "block2": {"placement.HEAD": "group_offload:blocks=2"},
    "leaf": {"placement.HEAD": "group_offload:type=leaf"},
    "leaf everywhere": {"placement": "group_offload:type=leaf"},
    "block everywhere": {"placement": "group_offload:blocks=1"},
    "mix": {
        "placement.HEAD": "group_offload:blocks=1",
        "placement.vae": "group_offload:type=leaf",
        "decode": "vae_slicing",
    },
    "mix of encoder": {"placement.HEAD": "resident", "placement.text_encoder": "group_offload:type=leaf"},
}
PIPE_ATTRIBUTES = ("_all_hooks", "_offload_device", "_offload_gpu_id")


def sizes(kind):
    names = ("height", "width", "num_frames", "num_inference_steps")
    return {name: value for name, value in call_kwargs(kind).items() if name in names}


def made(pipe, kind, settings=None, **more):
    named = {key.replace("HEAD", DENOISERS[kind]): value for key, value in (settings or {}).items()}
    return vramplan.plan(pipe, device=MACHINE, settings=named, simulate=False, **sizes(kind), **more)


def edited(plan, placement=None, decode=None):
    placement = {**plan.settings.placement, **(placement or {})}
    decode = plan.settings.decode if decode is None else decode
    return replace(plan, settings=Settings(placement=placement, decode=decode))


def output(pipe, kind, **more):
    return output_tensor(pipe(**call_kwargs(kind), **more))


def hooks(pipe):
    """The names of the hooks of every component that has any."""
    return {name: found for name, module in modules_of(pipe).items() if (found := hooks_of(module))}


def traces(pipe):
    """Whatever of hooks can be seen on any module of the pipeline, accelerate's and diffusers'."""
    found = set()
    for name, component in modules_of(pipe).items():
        for child, module in component.named_modules():
            registry = getattr(module, "_diffusers_hook", None)
            if hasattr(module, "_hf_hook") or _wrapped(module) or (registry and registry.hooks):
                found.add(f"{name}.{child}")
    return found


def _wrapped(module):
    """Taking a hook off sets `forward` on the module itself: the one of its class again, or something else."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def state(pipe):
    """All that applying may change: places, dtypes, VAE attributes, what calls leave on the pipeline."""
    weights = {name: _weights(module) for name, module in modules_of(pipe).items()}
    plain = {
        name: {key: value for key, value in vars(module).items() if "til" in key or "slic" in key or key == "training"}
        for name, module in modules_of(pipe).items()
    }
    own = {key: pipe.__dict__[key] for key in pipe.__dict__ if key.startswith(("_offload", "_all_hooks", "_vramplan"))}
    return weights, plain, own, traces(pipe)


def _weights(module):
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: (str(tensor.device), tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors}


@pytest.fixture(scope="module")
def untouched(small_pipeline):
    """The output of each untouched pipeline, made once."""
    found = {}

    def get(kind):
        if kind not in found:
            found[kind] = output(small_pipeline(kind), kind)
        return found[kind]

    return get


@pytest.fixture
def sd15(small_pipeline):
    return small_pipeline("sd15-small")


@pytest.mark.diagonal("kind", "name")
@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_a_lossless_plan_changes_no_bit_and_undo_leaves_nothing(small_pipeline, untouched, kind, name):
    pipe = small_pipeline(kind)
    before = state(pipe)
    plan = made(pipe, kind, LOSSLESS[name])
    assert plan.quality == "lossless"
    assert state(pipe) == before
    applied = vramplan.apply_plan(pipe, plan, device="cpu")
    assert set(hooks(pipe)) == {n for n, text in plan.settings.placement.items() if "offload" in text}
    assert torch.equal(output(pipe, kind), untouched(kind))
    assert torch.equal(output(pipe, kind), untouched(kind))  # a second call finds the hooks as the first did
    assert applied.undo() is pipe
    assert state(pipe) == before
    assert torch.equal(output(pipe, kind), untouched(kind))


@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_model_offload_hooks_are_those_of_accelerate_in_the_sequence(small_pipeline, kind):
    pipe = small_pipeline(kind)
    vramplan.apply_plan(pipe, made(pipe, kind, {"placement": "model_cpu_offload"}), device="cpu")
    assert all(type(module._hf_hook).__name__ == "CpuOffload" for module in modules_of(pipe).values())
    assert len(pipe._all_hooks) == len(modules_of(pipe))
    assert applied_to(pipe).calls == ('pipe.enable_model_cpu_offload(device="cpu")',)


@pytest.mark.parametrize(("text", "blocks"), [("blocks=1", 1), ("blocks=2", 2)])
def test_groups_are_of_the_asked_number_of_blocks(small_pipeline, text, blocks):
    pipe = small_pipeline("flux-small")
    plan = made(pipe, "flux-small", {"placement.transformer": f"group_offload:{text}"})
    vramplan.apply_plan(pipe, plan, device="cpu")
    lists = (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks)
    groups = [
        block._diffusers_hook.get_hook("group_offloading").group for blocks_of in lists for block in blocks_of[::blocks]
    ]
    assert [len(group.modules) for group in groups] == [blocks] * len(groups)
    assert sum(len(group.modules) for group in groups) == 6
    assert {str(group.onload_device) for group in groups} == {"cpu"}


def test_leaf_groups_are_on_the_leaves(small_pipeline):
    pipe = small_pipeline("sd15-small")
    plan = made(pipe, "sd15-small", {"placement.unet": "group_offload:type=leaf"})
    vramplan.apply_plan(pipe, plan, device="cpu")
    leaves = [module for module in pipe.unet.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    assert all(leaf._diffusers_hook.get_hook("group_offloading") for leaf in leaves)
    assert not hooks_of(pipe.vae)


class TestTwice:
    def test_applying_the_same_plan_again_gives_the_same_applied_and_no_second_hook(self, sd15):
        plan = made(sd15, "sd15-small", {"placement": "model_cpu_offload"})
        first = vramplan.apply_plan(sd15, plan, device="cpu")
        hook = sd15.unet._hf_hook
        assert vramplan.apply_plan(sd15, plan, device="cpu") is first
        assert sd15.unet._hf_hook is hook
        assert len(sd15._all_hooks) == 3

    def test_another_plan_replaces_the_first_and_undo_goes_back_to_the_beginning(self, sd15, untouched):
        before = state(sd15)
        first = vramplan.apply_plan(sd15, made(sd15, "sd15-small", {"placement": "model_cpu_offload"}), device="cpu")
        leaf = edited(first.plan, dict.fromkeys(first.plan.settings.placement, "group_offload:type=leaf"))
        second = vramplan.apply_plan(sd15, leaf, device="cpu")
        assert hooks(sd15) == dict.fromkeys(("vae", "text_encoder", "unet"), ("group_offloading",))
        assert applied_to(sd15) is second
        assert torch.equal(output(sd15, "sd15-small"), untouched("sd15-small"))
        first.undo()  # no longer applied: nothing to take off
        assert applied_to(sd15) is second
        assert hooks(sd15)
        second.undo()
        assert state(sd15) == before

    def test_undo_twice_is_the_same_as_once(self, sd15):
        applied = vramplan.apply_plan(sd15, made(sd15, "sd15-small", LOSSLESS["model"]), device="cpu")
        applied.undo()
        sd15.enable_model_cpu_offload(device="cpu")  # the user's own, afterwards
        applied.undo()
        assert set(hooks(sd15)) == {"vae", "text_encoder", "unet"}

    def test_a_plan_that_is_refused_leaves_the_earlier_one_on(self, sd15, untouched):
        plan = made(sd15, "sd15-small", {"placement": "model_cpu_offload"})
        applied = vramplan.apply_plan(sd15, plan, device="cpu")
        wrong = edited(plan, dict.fromkeys(plan.settings.placement, "group_offload:blocks=0"))
        with pytest.raises(UsageError):
            vramplan.apply_plan(sd15, wrong, device="cpu")
        assert applied_to(sd15) is applied
        assert hooks(sd15)["unet"] == ("model_cpu_offload",)
        assert torch.equal(output(sd15, "sd15-small"), untouched("sd15-small"))
        applied.undo()
        assert not traces(sd15)

    def test_a_component_taken_out_afterwards_does_not_hinder_undo(self, sd15):
        plan = made(sd15, "sd15-small", {"placement.text_encoder": "group_offload:type=leaf"})
        applied = vramplan.apply_plan(sd15, plan, device="cpu")
        sd15.text_encoder = None
        applied.undo()
        assert not traces(sd15)
        assert applied_to(sd15) is None


class TestFailure:
    @pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
    def test_one_in_the_middle_restores_everything(self, sd15, untouched, monkeypatch, error):
        before = state(sd15)
        settings = {
            "placement.unet": "group_offload:type=leaf",
            "placement.text_encoder": "group_offload:blocks=1",
            "decode": "vae_slicing",
        }
        plan = made(sd15, "sd15-small", settings)
        seen = []

        def fails(self, pipe, names, device):
            seen.append(traces(pipe))
            raise error

        monkeypatch.setattr(Resident, "apply", fails)  # residents come last
        with pytest.raises(type(error)):
            vramplan.apply_plan(sd15, plan, device="cpu")
        assert seen[0]  # there was something to take off
        assert state(sd15) == before
        assert applied_to(sd15) is None
        assert torch.equal(output(sd15, "sd15-small"), untouched("sd15-small"))

    def test_one_within_a_group_offload_restores_the_components_already_hooked(self, sd15, monkeypatch):
        before = state(sd15)
        plan = made(sd15, "sd15-small", {"placement": "group_offload:type=leaf"})
        real = GroupOffload.apply

        def fails_after_the_first(self, pipe, names, device):
            real(self, pipe, names[:1], device)
            raise RuntimeError("broken")

        monkeypatch.setattr(GroupOffload, "apply", fails_after_the_first)
        with pytest.raises(RuntimeError, match="broken"):
            vramplan.apply_plan(sd15, plan, device="cpu")
        assert state(sd15) == before

    def test_one_within_model_offload_leaves_no_pipeline_attribute(self, sd15, monkeypatch):
        plan = made(sd15, "sd15-small", {"placement": "model_cpu_offload"})
        real = ModelCpuOffload.apply

        def fails_at_the_end(self, pipe, names, device):
            real(self, pipe, names, device)
            raise KeyboardInterrupt

        monkeypatch.setattr(ModelCpuOffload, "apply", fails_at_the_end)
        before = state(sd15)
        with pytest.raises(KeyboardInterrupt):
            vramplan.apply_plan(sd15, plan, device="cpu")
        assert state(sd15) == before


class Combined(StableDiffusionPipeline):
    """As Kandinsky's combined pipelines are: another one inside, of the same modules, which is told to offload."""

    def enable_model_cpu_offload(self, gpu_id=None, device=None):
        self.inner.enable_model_cpu_offload(gpu_id=gpu_id, device=device)

    def __call__(self, *args, **kwargs):
        made = self.inner(*args, **kwargs)
        self.maybe_free_model_hooks()
        return made


def test_the_pipelines_inside_of_a_combined_one_are_unhooked_too(sd15, untouched):
    pipe = Combined(**sd15.components, requires_safety_checker=False)
    pipe.inner = sd15
    before = state(pipe), state(sd15)
    applied = vramplan.apply_plan(pipe, made(pipe, "sd15-small", {"placement": "model_cpu_offload"}), device="cpu")
    assert sd15._all_hooks
    applied.undo()
    assert (state(pipe), state(sd15)) == before
    assert torch.equal(output(pipe, "sd15-small"), untouched("sd15-small"))
    assert not hooks(pipe)  # which the inner one's call would have put on again


class TestSequential:
    """Its hooks need a second device; `meta` is one that every machine has, though nothing can run there."""

    def test_hooks_go_on_and_off_again_with_all_weights(self, small_pipeline, untouched):
        # Not CLIP: buffers are moved to the device itself, and what is moved to `meta` is lost.
        pipe = small_pipeline("cogvideox-small")
        before = {name: dict(module.state_dict()) for name, module in modules_of(pipe).items()}
        names = list(before)
        SequentialCpuOffload().apply(pipe, names, "meta")
        assert hooks(pipe) == dict.fromkeys(names, ("sequential_cpu_offload",))
        assert all(p.device.type == "meta" for p in pipe.transformer.parameters())
        SequentialCpuOffload().remove(pipe, names)
        assert not traces(pipe)
        for name, module in modules_of(pipe).items():
            assert all(torch.equal(tensor, before[name][key]) for key, tensor in module.state_dict().items())
        assert torch.equal(output(pipe, "cogvideox-small"), untouched("cogvideox-small"))

    def test_undo_leaves_tied_weights_tied(self, small_pipeline, untouched, monkeypatch):
        monkeypatch.setattr("vramplan.runtime.applied.check_device", lambda *_: None)
        pipe = small_pipeline("cogvideox-small")
        before, spec = state(pipe), spec_from_pipeline(pipe)
        plan = made(pipe, "cogvideox-small", {"placement": "sequential_cpu_offload"})
        applied = vramplan.apply_plan(pipe, plan, device="meta")
        assert set(hooks(pipe)) == set(modules_of(pipe))
        applied.undo()
        assert pipe.text_encoder.shared.weight is pipe.text_encoder.encoder.embed_tokens.weight
        assert fingerprint(spec_from_pipeline(pipe)) == fingerprint(spec)
        assert state(pipe) == before
        assert torch.equal(output(pipe, "cogvideox-small"), untouched("cogvideox-small"))

    def test_the_cpu_is_refused_and_the_pipeline_is_as_it_was(self, sd15, untouched):
        before = state(sd15)
        plan = made(sd15, "sd15-small", {"placement": "sequential_cpu_offload"})
        with pytest.raises(UsageError, match="another device"):
            vramplan.apply_plan(sd15, plan, device="cpu")
        assert state(sd15) == before
        assert torch.equal(output(sd15, "sd15-small"), untouched("sd15-small"))


class TestDecode:
    @pytest.mark.parametrize("kind", SMALL_KINDS)
    def test_slicing_is_set_on_the_vae_and_taken_off(self, small_pipeline, kind):
        pipe = small_pipeline(kind)
        applied = vramplan.apply_plan(pipe, made(pipe, kind, {"decode": "vae_slicing"}), device="cpu")
        assert pipe.vae.use_slicing is True
        applied.undo()
        assert pipe.vae.use_slicing is False

    def test_slicing_decodes_a_batch_one_by_one_and_changes_no_bit(self, small_pipeline):
        pipe = small_pipeline("flux-small")
        plain, calls = counted(pipe, "flux-small", num_images_per_prompt=2)
        plan = made(pipe, "flux-small", {"decode": "vae_slicing"}, num_images_per_prompt=2)
        vramplan.apply_plan(pipe, plan, device="cpu")
        sliced, calls_sliced = counted(pipe, "flux-small", num_images_per_prompt=2)
        assert (calls, calls_sliced) == (1, 2)
        assert sliced.shape == plain.shape
        assert torch.allclose(sliced, plain, atol=1e-5)

    @pytest.mark.parametrize("kind", SMALL_KINDS)
    def test_tiling_really_cuts_the_picture_and_keeps_its_size(self, small_pipeline, untouched, kind):
        pipe = small_pipeline(kind)
        before = state(pipe)
        plan = tiled(pipe, kind)
        assert plan.quality == "near_lossless"
        assert any("vae_tiling:tile=" in text for text in plan.settings.decode)
        _, calls = counted(pipe, kind)
        applied = vramplan.apply_plan(pipe, plan, device="cpu")
        assert pipe.vae.use_tiling is True
        picture, calls_tiled = counted(pipe, kind)
        assert calls_tiled >= 4 * calls
        assert picture.shape == untouched(kind).shape
        assert picture.isfinite().all()
        applied.undo()
        assert state(pipe) == before
        assert torch.equal(output(pipe, kind), untouched(kind))

    def test_tiles_of_a_given_size_scale_every_attribute_alike(self, small_pipeline):
        pipe = small_pipeline("cogvideox-small")
        height, width = pipe.vae.tile_latent_min_height, pipe.vae.tile_latent_min_width
        plan = tiled(pipe, "cogvideox-small")
        side = int(next(text for text in plan.settings.decode if "tile=" in text).partition("tile=")[2])
        vramplan.apply_plan(pipe, plan, device="cpu")
        assert pipe.vae.tile_sample_min_width == side
        assert pipe.vae.tile_latent_min_height * width == pipe.vae.tile_latent_min_width * height

    def test_the_users_own_settings_come_back(self, sd15):
        sd15.vae.enable_slicing()
        sd15.vae.tile_overlap_factor = 0.125
        applied = vramplan.apply_plan(sd15, made(sd15, "sd15-small", {"placement": "resident"}), device="cpu")
        applied.undo()
        assert sd15.vae.use_slicing is True
        assert sd15.vae.tile_overlap_factor == 0.125


def tiled(pipe, kind):
    plans = made(pipe, kind, allow="near_lossless").candidates
    setting = next(item for item in plans if any("vae_tiling" in text for text in item.settings.decode))
    return made(pipe, kind, {"decode": list(setting.settings.decode)}, allow="near_lossless")


def counted(pipe, kind, **more):
    """The output of a call, and how often the VAE's decoder ran in it."""
    calls = []
    handle = pipe.vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        return output(pipe, kind, **more), len(calls)
    finally:
        handle.remove()


class TestMismatch:
    def refused(self, pipe, plan, match, **options):
        before = state(pipe)
        with pytest.raises(MismatchError, match=match) as caught:
            vramplan.apply_plan(pipe, plan, **options)
        assert caught.value.exit_code == 4
        assert "\n" not in str(caught.value)
        assert state(pipe) == before

    def test_another_pipeline_class(self, sd15, small_pipeline):
        plan = made(small_pipeline("sdxl-small"), "sdxl-small")
        self.refused(sd15, plan, "for a StableDiffusionXLPipeline, this is a StableDiffusionPipeline", device="cpu")

    def test_other_weights(self, sd15, small_pipeline):
        plan = made(sd15, "sd15-small")
        other = small_pipeline("sd15-small")
        other.unet.conv_in = torch.nn.Conv2d(4, 16, 5, padding=2)
        self.refused(other, plan, "unet: the plan is for .* bytes of weights, this pipeline has", device="cpu")

    def test_another_dtype_is_named_before_the_bytes_it_changes(self, sd15, small_pipeline):
        plan = made(sd15, "sd15-small")
        other = small_pipeline("sd15-small", dtype=torch.bfloat16)
        self.refused(other, plan, "the plan is for float32, this pipeline has bfloat16; make the plan", device="cpu")

    def test_a_component_more_or_less(self, sd15, small_pipeline):
        plan = made(sd15, "sd15-small")
        without = small_pipeline("sd15-small", text_encoder=None)
        self.refused(without, plan, "text_encoder is in the plan, not in this pipeline", device="cpu")
        self.refused(
            sd15, made(without, "sd15-small"), "text_encoder is in this pipeline, not in the plan", device="cpu"
        )

    @pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
    def test_a_device_that_is_not_here(self, sd15):
        plan = made(sd15, "sd15-small", {"placement": "model_cpu_offload"})
        self.refused(sd15, plan, r"cuda:0 \(made-up card\); here torch sees no accelerator")
        self.refused(sd15, plan, "for banana", device="banana")
        self.refused(sd15, plan, "for cuda:x", device="cuda:x")

    def test_a_plan_read_from_yaml_is_for_the_pipeline_it_was_made_for(self, sd15):
        plan = parse_plan(dump_plan(made(sd15, "sd15-small", {"placement": "model_cpu_offload"})))
        assert vramplan.apply_plan(sd15, plan, device="cpu").plan is plan
        assert hooks(sd15)

    @pytest.mark.parametrize("kind", SMALL_KINDS)
    def test_a_plan_of_the_folder_is_for_the_pipeline_loaded_from_it(self, small_folder, small_pipeline, kind):
        plan = vramplan.plan(str(small_folder(kind)), device="cpu", **sizes(kind))
        assert vramplan.apply_plan(small_pipeline(kind), plan).device == "cpu"


class TestEditedPlans:
    @pytest.mark.parametrize(
        ("placement", "match"),
        [
            ({"unet": "nonsense"}, "settings.placement.unet: 'nonsense' is not a strategy"),
            ({"unet": "group_offload:blocks=0"}, "settings.placement.unet: .*at least one block"),
            ({"unet": "group_offload:type=leaf,blocks=2"}, "settings.placement.unet: blocks is for type=block"),
            ({"unet": "group_offload:stream=true"}, "settings.placement.unet: stream=true needs a device with streams"),
            ({"unet": "group_offload:record_stream=true"}, "settings.placement.unet: .*only work with stream=true"),
            ({"unet": "group_offload:within=nowhere"}, "settings.placement.unet: .*leave it out"),
            ({"unet": "model_cpu_offload"}, "settings.placement: model_cpu_offload is for the whole pipeline"),
            ({"safety": "resident"}, "settings.placement.safety: StableDiffusionPipeline has no such component"),
        ],
    )
    def test_what_cannot_be_is_refused_by_its_place(self, sd15, placement, match):
        before = state(sd15)
        plan = edited(made(sd15, "sd15-small", {"placement": "resident"}), placement)
        with pytest.raises(UsageError, match=match):
            vramplan.apply_plan(sd15, plan, device="cpu")
        assert state(sd15) == before

    def test_a_component_without_a_placement_is_refused(self, sd15):
        plan = made(sd15, "sd15-small", {"placement": "resident"})
        short = {"unet": "resident", "vae": "resident"}
        plan = replace(plan, settings=Settings(placement=short))
        with pytest.raises(UsageError, match=r"settings\.placement\.text_encoder: text_encoder is not placed"):
            vramplan.apply_plan(sd15, plan, device="cpu")

    @pytest.mark.parametrize("decode", ["nonsense", "vae_tiling:tile=33", "vae_tiling:tile=x", "vae_tiling:sides=3"])
    def test_an_impossible_decode_is_refused_by_its_place(self, sd15, decode):
        before = state(sd15)
        plan = edited(made(sd15, "sd15-small"), decode=(decode,))
        with pytest.raises(UsageError, match=r"settings\.decode: "):
            vramplan.apply_plan(sd15, plan, device="cpu")
        assert state(sd15) == before

    def test_the_cpu_has_no_streams_by_any_of_its_names(self, sd15):
        plan = edited(made(sd15, "sd15-small"), {"unet": "group_offload:stream=true"})
        for device in ("cpu", "cpu:0"):
            with pytest.raises(UsageError, match="streams"):
                vramplan.apply_plan(sd15, plan, device=device)


class TestOthersHooks:
    @pytest.mark.parametrize("how", ["model", "group"])
    def test_a_pipeline_hooked_by_hand_is_refused_and_left_as_it_was(self, sd15, small_pipeline, untouched, how):
        plan = made(sd15, "sd15-small", {"placement": "model_cpu_offload"})
        hooked = small_pipeline("sd15-small")
        if how == "model":
            hooked.enable_model_cpu_offload(device="cpu")
        else:
            hooked.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        before = state(hooked)
        assert before[3]
        for call in (
            lambda: vramplan.apply_plan(hooked, plan, device="cpu"),
            lambda: vramplan.auto_configure(hooked, device="cpu"),
            lambda: vramplan.plan(hooked, device=MACHINE),
        ):
            with pytest.raises(VramplanError, match=r"already has .* set outside vramplan"):
                call()
        assert state(hooked) == before
        assert torch.equal(output(hooked, "sd15-small"), untouched("sd15-small"))

    def test_a_device_number_left_over_does_not_survive(self, sd15):
        sd15._offload_gpu_id = 1
        plan = made(sd15, "sd15-small", {"placement": "model_cpu_offload"})
        applied = vramplan.apply_plan(sd15, plan, device="cpu")
        assert sd15._offload_gpu_id != 1
        assert sd15._offload_device.type == "cpu"
        applied.undo()
        assert sd15._offload_gpu_id == 1  # the pipeline as it was


class TestAppliedValue:
    def test_its_calls_are_python_and_its_repr_is_short_of_internals(self, sd15):
        applied = vramplan.apply_plan(sd15, made(sd15, "sd15-small", LOSSLESS["block2"]), device="cpu")
        compile("\n".join(applied.calls), "calls", "exec")
        assert "num_blocks_per_group=2" in "\n".join(applied.calls)
        assert "_before" not in repr(applied)

    def test_its_calls_made_by_hand_have_the_same_effect(self, sd15, small_pipeline):
        plan = edited(tiled(sd15, "sd15-small"), {"unet": "group_offload:type=leaf"})
        applied = vramplan.apply_plan(sd15, plan, device="cpu")
        by_hand = small_pipeline("sd15-small")
        exec("\n".join(applied.calls), {"pipe": by_hand})
        assert traces(by_hand) == traces(sd15)
        assert state(by_hand)[:2] == state(sd15)[:2]
        assert torch.equal(output(by_hand, "sd15-small"), output(sd15, "sd15-small"))

    def test_nothing_is_on_a_pipeline_nobody_applied_to(self, sd15):
        assert applied_to(sd15) is None
        assert applied_to(object()) is None
