"""Loading one component at a time, encoding first, and the script that does the same in plain diffusers calls."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from make_pipeline import SMALL_KINDS

import vramplan
from tests.support.calls import output_tensor
from vramplan.api.code import plan_code
from vramplan.api.run import run_plan
from vramplan.errors import MismatchError, UsageError, VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.component import hooks_of
from vramplan.pipeline.modules import modules_of
from vramplan.pipeline.prompt import EncodeError, call_encoded, encode
from vramplan.runtime.applied import applied_to
from vramplan.runtime.call import call_arguments
from vramplan.runtime.staged import load_applied
from vramplan.units import GIB

CARD = Accelerator(kind="cuda", index=0, name="made-up card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))
PROMPT = "a photo of a red fox in the snow"
FIRST = {"placement.text_encoder": "encode_first"}
BY_LEAF = {"placement.text_encoder": "encode_first:leaf=true", "placement.vae": "group_offload:type=leaf"}

UNDONE = {
    "resident": {"placement": "resident"},
    "model": {"placement": "model_cpu_offload"},
    "leaf": {"placement": "group_offload:type=leaf"},
    "block": {"placement.transformer": "group_offload:blocks=1", "placement.vae": "group_offload:type=leaf"},
    "disk": {"placement.transformer": "group_offload:disk=true", "placement.text_encoder_2": "group_offload:disk=true"},
}
KERNELS = {
    "attention.transformer": "attention_backend:backend=_native_math",
    "compile.transformer": "compile_repeated_blocks",
}


def make_plan(folder, **options):
    usual = {"device": MACHINE, "height": 64, "width": 64, "steps": 2, "simulate": False}
    return vramplan.plan(str(folder), **usual | ({"frames": 9} if "cogvideox" in str(folder) else {}) | options)


def arguments_of(plan):
    return lambda pipe: call_arguments(pipe, plan, PROMPT, seed=1) | {"output_type": "pt"}


def loaded(plan, folder, **options):
    usual = {"device": "cpu", "say": lambda _: None}
    return load_applied(plan, folder, arguments_of(plan), **usual | options)


def ordinary(plan, pipe):
    return output_tensor(pipe(**arguments_of(plan)(pipe)))


class TestLoading:
    @pytest.mark.diagonal("kind", "dtype")
    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    @pytest.mark.parametrize("kind", SMALL_KINDS)
    def test_every_component_is_loaded_as_planned(self, small_folder, kind, dtype) -> None:
        plan = make_plan(small_folder(kind), dtype=dtype)
        said = []
        applied = loaded(plan, small_folder(kind), say=said.append).applied
        assert type(applied.pipe).__name__ == plan.model.class_name
        for record in plan.model.components:
            assert str(applied.pipe.components[record.name].dtype) == f"torch.{record.dtype}"
        assert tuple(line.split()[1].rstrip(":") for line in said) == plan.projected.load.order

    @pytest.mark.diagonal("kind", "settings")
    @pytest.mark.parametrize("settings", [{}, FIRST, BY_LEAF, {"placement": "model_cpu_offload"}])
    @pytest.mark.parametrize("kind", SMALL_KINDS)
    def test_the_output_is_that_of_an_ordinary_load(self, small_folder, small_pipeline, kind, settings) -> None:
        plan = make_plan(small_folder(kind), settings=settings)
        found = loaded(plan, small_folder(kind))
        assert torch.equal(output_tensor(found()), ordinary(plan, small_pipeline(kind)))

    def test_what_is_undone_runs_without_hooks(self, small_folder, small_pipeline) -> None:
        plan = make_plan(small_folder("sd15-small"), settings={"placement": "group_offload:type=leaf"})
        pipe = loaded(plan, small_folder("sd15-small")).applied.undo()
        assert not any(getattr(module, "_diffusers_hook", None) and module._diffusers_hook.hooks
                       for part in modules_of(pipe).values() for module in part.modules())  # fmt: skip
        assert torch.equal(ordinary(plan, pipe), ordinary(plan, small_pipeline("sd15-small")))

    @pytest.mark.parametrize("name", UNDONE)
    def test_what_is_undone_is_as_it_is_loaded_without_a_plan(
        self, name, small_folder, small_pipeline, monkeypatch, tmp_path
    ):
        monkeypatch.setenv("VRAMPLAN_OFFLOAD", str(tmp_path / "offload"))
        monkeypatch.setattr(
            "vramplan.runtime.staged.planned_accelerator", lambda plan, device: plan.machine.accelerator
        )
        monkeypatch.setattr("vramplan.runtime.staged.check_device", lambda *_: None)
        folder = small_folder("flux-small")
        plan = make_plan(folder, settings=UNDONE[name] | KERNELS)
        applied = loaded(plan, folder).applied
        pipe = applied.pipe
        assert {p._attention_backend.value for p in pipe.transformer.attn_processors.values()} == {"_native_math"}
        assert pipe.transformer.transformer_blocks[0]._compiled_call_impl is not None
        applied.undo()
        plain = small_pipeline("flux-small")
        assert applied_to(pipe) is None
        assert vars(pipe).keys() == vars(plain).keys() - {"_progress_bar_config"}
        for part, module in modules_of(pipe).items():
            for path, child in modules_of(plain)[part].named_modules():
                here = module.get_submodule(path)
                assert vars(here).keys() - {"_diffusers_hook", "_compiled_call_impl"} == vars(child).keys(), (
                    part,
                    path,
                )
                assert here._compiled_call_impl is None
                assert getattr(getattr(here, "processor", None), "_attention_backend", None) is None
            assert not hooks_of(module)
            state, wanted = module.state_dict(), modules_of(plain)[part].state_dict()
            assert all(
                tensor.device.type == "cpu" and torch.equal(tensor, wanted[key]) for key, tensor in state.items()
            )
        assert not list(tmp_path.rglob("*.safetensors"))

    def test_undone_weights_go_to_the_devices_that_were_told(self, small_folder, monkeypatch) -> None:
        from vramplan.runtime.applied import finish_applying

        plan = make_plan(small_folder("sd15-small"), settings={"placement": "group_offload:type=leaf"})
        first = loaded(plan, small_folder("sd15-small")).applied
        told, moved = {"unet": "cuda:1", "vae": "cpu", "text_encoder": "cuda:0"}, {}
        monkeypatch.setattr(
            "vramplan.streaming.tensors.move", lambda tensor, device: moved.setdefault(id(tensor), device)
        )
        options = {"placed": first._placed, "decodes": [], "remaining": [], "devices": told}
        pipe = finish_applying(first.pipe, plan, "cpu", **options).undo()
        for part, module in modules_of(pipe).items():
            tensors = [*module.parameters(), *module.buffers()]
            assert {moved[id(tensor)] for tensor in tensors} == {told[part]}
            assert not hooks_of(module)

    @pytest.mark.parametrize("name", UNDONE)
    def test_what_fails_at_the_last_leaves_no_hooks_and_no_files(self, name, small_folder, monkeypatch, tmp_path):
        from vramplan.strategies.attention_backend import AttentionBackend

        monkeypatch.setenv("VRAMPLAN_OFFLOAD", str(tmp_path / "offload"))
        monkeypatch.setattr(
            "vramplan.runtime.staged.planned_accelerator", lambda plan, device: plan.machine.accelerator
        )
        monkeypatch.setattr("vramplan.runtime.staged.check_device", lambda *_: None)
        folder = small_folder("flux-small")
        plan = make_plan(folder, settings=UNDONE[name] | KERNELS)
        seen, real = [], AttentionBackend.apply

        def fails(self, pipe, names, device):
            real(self, pipe, names, device)
            seen.append(pipe)
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(AttentionBackend, "apply", fails)
        with pytest.raises(RuntimeError, match="no such kernel"):
            loaded(plan, folder)
        (pipe,) = seen
        assert applied_to(pipe) is None
        assert {p._attention_backend for p in pipe.transformer.attn_processors.values()} == {None}
        seen.clear()
        del pipe
        gc.collect()
        assert not list(tmp_path.rglob("*.safetensors"))

    def test_a_damaged_component_is_named_and_nothing_of_the_plan_stays(self, small_folder, tmp_path) -> None:
        import shutil

        folder = shutil.copytree(small_folder("sd15-small"), tmp_path / "sd15")
        plan = make_plan(folder)
        path = folder / "vae" / "diffusion_pytorch_model.safetensors"
        header = int.from_bytes(path.read_bytes()[:8], "little")
        path.write_bytes(path.read_bytes()[:8] + b" " * header + path.read_bytes()[8 + header :])
        with pytest.raises(VramplanError, match="vae") as caught:
            loaded(plan, folder)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 1

    def test_another_folder_is_told_before_anything_is_loaded(self, small_folder) -> None:
        said = []
        with pytest.raises(MismatchError, match="the plan is for a"):
            loaded(make_plan(small_folder("sd15-small")), small_folder("flux-small"), say=said.append)
        assert said == []


class TestEncodeFirst:
    def test_encoders_and_the_rest_are_never_there_together(self, small_folder) -> None:
        said = []
        plan = make_plan(small_folder("flux-small"), settings=FIRST)
        found = loaded(plan, small_folder("flux-small"), say=said.append)
        assert [line.split()[0] for line in said] == ["loading", "loading", "encoding", "loading", "loading"]
        assert {line.split()[1].rstrip(":") for line in said[:2]} == {"text_encoder", "text_encoder_2"}
        assert found.applied.pipe.text_encoder is None
        assert not any(name.startswith("text") for name in modules_of(found.applied.pipe))

    @pytest.mark.parametrize("batch", [1, 2])
    def test_several_pictures_are_those_of_the_ordinary_call(self, small_folder, small_pipeline, batch) -> None:
        for kind in ("sd15-small", "flux-small"):
            plan = make_plan(small_folder(kind), settings=FIRST, batch=batch)
            got = output_tensor(loaded(plan, small_folder(kind))())
            assert got.shape[0] == batch
            assert torch.equal(got, ordinary(plan, small_pipeline(kind)))

    def test_without_a_prompt_it_says_so(self, small_folder) -> None:
        plan = make_plan(small_folder("sd15-small"), settings=FIRST)
        with pytest.raises(UsageError, match="encodes the prompt first and drops text_encoder: give `prompt`"):
            load_applied(plan, small_folder("sd15-small"), None, device="cpu", say=print)

    def test_a_loaded_pipeline_is_refused_with_the_reason(self, small_folder, small_pipeline) -> None:
        plan = make_plan(small_folder("sd15-small"), settings=FIRST)
        with pytest.raises(UsageError, match="loaded already"):
            vramplan.apply_plan(small_pipeline("sd15-small"), plan, device="cpu")
        with pytest.raises(UsageError, match="loaded already"):
            make_live(small_pipeline("sd15-small"))

    def test_one_of_two_encoders_alone_is_refused(self, small_folder) -> None:
        plan = make_plan(small_folder("flux-small"), settings=FIRST)
        torn = replace(plan.settings, placement={**plan.settings.placement, "text_encoder_2": "resident"})
        with pytest.raises(UsageError, match="encode_first must be on text_encoder_2 too"):
            loaded(replace(plan, settings=torn), small_folder("flux-small"))

    @pytest.mark.parametrize("kind", SMALL_KINDS)
    def test_simulated_the_encoders_are_not_beside_the_rest(self, small_folder, kind) -> None:
        plan = make_plan(small_folder(kind), settings=FIRST, simulate=True)
        encode, denoise, _ = plan.projected.phases
        weights = {record.name: record.weight_bytes for record in plan.model.components}
        encoders = sum(size for name, size in weights.items() if name.startswith("text"))
        # the caching allocator rounds every tensor up to 512 bytes
        assert encoders <= encode.weights_bytes < encoders * 1.2
        assert denoise.weights_bytes < (sum(weights.values()) - encoders) * 1.2
        assert plan.projected.basis == "simulated"

    def test_the_command_generates(self, small_folder, tmp_path) -> None:
        plan = make_plan(small_folder("sd15-small"), settings=FIRST)
        on_cpu = replace(plan, machine=replace(plan.machine, device="cpu", accelerator=None))
        said = []
        ran = run_plan(on_cpu, prompt=PROMPT, output=str(tmp_path / "a.png"), say=said.append)
        assert "encoding the prompt on cpu" in said
        assert (tmp_path / "a.png").stat().st_size > 50
        assert ran.measured.seconds > 0

    def test_embeddings_that_the_call_would_change_are_not_used(self, small_pipeline) -> None:
        pipe = small_pipeline("sd15-small")
        call = {"prompt": PROMPT, "height": 64, "width": 64, "num_inference_steps": 1}
        encoded = encode(pipe, call, ["text_encoder"])
        pipe.text_encoder = None
        call_encoded(pipe, encoded)
        changed = {name: value * 2 if name == "prompt_embeds" else value for name, value in encoded.arguments.items()}
        with pytest.raises(EncodeError, match="does not take its prompt encoded"):
            call_encoded(pipe, replace(encoded, arguments=changed))


def make_live(pipe):
    return vramplan.plan(pipe, device=MACHINE, height=64, width=64, simulate=False, settings=FIRST)


class TestScript:
    @pytest.mark.diagonal("kind", "settings")
    @pytest.mark.parametrize("settings", [{}, FIRST, BY_LEAF, {"placement": "model_cpu_offload"}])
    @pytest.mark.parametrize("kind", SMALL_KINDS)
    def test_it_runs_and_its_output_is_that_of_the_ordinary_call(
        self, small_folder, small_pipeline, kind, settings
    ) -> None:
        plan = make_plan(small_folder(kind), settings=settings)
        code = plan_code(plan).replace("cuda:0", "cpu").replace("torch.accelerator.empty_cache()", "")
        code = code.replace("result = pipe(", 'result = pipe(output_type="pt", ')
        names: dict = {}
        exec(compile(code, "plan", "exec"), names)
        result = names.get("result")
        if "result" not in names:
            result = names["pipe"](**arguments_of(plan)(names["pipe"]) | {"generator": generator()})
        want = small_pipeline(kind)(**arguments_of(plan)(names["pipe"]) | {"generator": generator()})
        assert torch.equal(output_tensor(result), output_tensor(want))


def generator():
    return torch.Generator("cpu").manual_seed(0)
