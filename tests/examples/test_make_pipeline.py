from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import make_pipeline
import pytest
import torch
from make_pipeline import SMALL_KINDS
from transformers import AutoTokenizer

from tests.support.calls import call_kwargs, output_tensor
from vramplan.errors import UsageError

PROMPT = "A photo of a red fox"
CLASSES = {
    "sd15-small": "StableDiffusionPipeline",
    "sdxl-small": "StableDiffusionXLPipeline",
    "flux-small": "FluxPipeline",
    "cogvideox-small": "CogVideoXPipeline",
}


def _counts(pipeline):
    modules = {n: c for n, c in pipeline.components.items() if isinstance(c, torch.nn.Module)}
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}


def _files(folder):
    return {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", SMALL_KINDS)
class TestSmallKinds:
    def test_it_is_the_real_class_in_a_few_megabytes_of_safetensors(self, small_folder, kind):
        files = _files(small_folder(kind))
        index = json.loads((small_folder(kind) / "model_index.json").read_text())
        assert index["_class_name"] == CLASSES[kind]
        assert sum(path.stat().st_size for path in files.values()) < 20e6
        assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja", ".txt"}
        assert any(path.suffix == ".safetensors" for path in files)

    def test_the_same_seed_gives_the_same_output_from_two_instances(self, small_pipeline, kind):
        first, second = (output_tensor(small_pipeline(kind)(**call_kwargs(kind))) for _ in range(2))
        assert torch.equal(first, second)
        assert first.isfinite().all()
        assert first.shape[-2:] == (64, 64)
        assert first.std() > 0.05  # a picture, if only of noise: not one flat colour

    def test_the_prompt_and_the_generator_matter(self, small_pipeline, kind):
        pipeline = small_pipeline(kind)
        plain = output_tensor(pipeline(**call_kwargs(kind)))
        other_prompt = call_kwargs(kind) | {"prompt": "an oil painting of the sea at night"}
        assert not torch.allclose(plain, output_tensor(pipeline(**other_prompt)), atol=1e-2)
        assert not torch.allclose(plain, output_tensor(pipeline(**call_kwargs(kind, seed=1))), atol=1e-2)

    def test_tiling_acts_and_keeps_the_size(self, small_pipeline, kind):
        pipeline = small_pipeline(kind)
        plain = output_tensor(pipeline(**call_kwargs(kind)))
        pipeline.vae.enable_tiling()
        tiled = output_tensor(pipeline(**call_kwargs(kind)))
        assert tiled.shape == plain.shape
        assert not torch.allclose(tiled, plain)
        assert tiled.isfinite().all()

    def test_slicing_gives_the_same_batch(self, small_pipeline, kind):
        pipeline = small_pipeline(kind)
        batch = {"prompt": [PROMPT, "a cat by the window"]}
        whole = output_tensor(pipeline(**(call_kwargs(kind) | batch)))
        pipeline.vae.enable_slicing()
        sliced = output_tensor(pipeline(**(call_kwargs(kind) | batch)))
        assert len(whole) == 2
        torch.testing.assert_close(sliced, whole, atol=1e-4, rtol=1e-4)

    def test_blocks_make_several_groups(self, small_pipeline, kind):
        for name, component in small_pipeline(kind).components.items():
            if isinstance(component, torch.nn.Module) and name != "vae":
                lists = [m for m in component.modules() if isinstance(m, torch.nn.ModuleList)]
                assert max(map(len, lists)) >= 2, name

    def test_built_twice_it_is_the_same_to_the_byte(self, small_folder, tmp_path, kind):
        files, again = _files(small_folder(kind)), _files(make_pipeline.save(kind, tmp_path / "again"))
        assert files.keys() == again.keys()
        assert [n for n, path in files.items() if path.read_bytes() != again[n].read_bytes()] == []

    def test_another_seed_gives_other_weights(self, kind):
        first, second = (make_pipeline.build(kind, seed=seed).vae.decoder for seed in (0, 1))
        assert not torch.equal(*(next(decoder.parameters()) for decoder in (first, second)))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_it_is_saved_and_loaded_in_the_dtype_asked_for(self, tmp_path, kind, dtype):
        folder = make_pipeline.save(kind, tmp_path / "pipeline", dtype=dtype)
        loaded = make_pipeline.diffusers.DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, dtype=getattr(torch, dtype)
        )
        denoiser = loaded.components.get("unet") or loaded.transformer
        assert {p.dtype for p in denoiser.parameters()} == {getattr(torch, dtype)}
        assert all(p.isfinite().all() for p in denoiser.parameters())

    def test_its_tokenizers_really_tokenize(self, small_pipeline, kind):
        pipeline = small_pipeline(kind)
        for name in ("tokenizer", "tokenizer_2"):
            if (tokenizer := getattr(pipeline, name, None)) is not None:
                assert len(tokenizer) > 100
                assert PROMPT.lower() in tokenizer.decode(tokenizer(PROMPT).input_ids).lower()
                _check_lengths_and_ids(tokenizer)

    def test_its_tokenizers_load_by_themselves(self, small_folder, kind):
        for folder in small_folder(kind).glob("tokenizer*"):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            _check_lengths_and_ids(tokenizer)


def _check_lengths_and_ids(tokenizer):
    length = tokenizer.model_max_length
    ids = tokenizer(PROMPT, padding="max_length", max_length=length, truncation=True).input_ids
    long_ids = tokenizer("fox " * 1000, max_length=length, truncation=True).input_ids
    assert len(ids) == len(long_ids) == length
    words = tokenizer(PROMPT, add_special_tokens=False).input_ids
    assert len(words) >= len(PROMPT.split())
    assert len(set(words)) >= 5  # "a" is there twice
    assert tokenizer.unk_token_id not in words
    assert max(ids) < len(tokenizer)


def test_any_text_can_be_encoded_for_clip():
    tokenizer = make_pipeline.clip_tokenizer()
    ids = tokenizer("Žluťoučký 狐 🦊 42", add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.eos_token_id == len(tokenizer) - 1


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 64), (48, 32), (64, 48), (96, 80)])
@pytest.mark.parametrize("tiling", [False, True])
def test_the_video_has_the_size_asked_for(small_pipeline, height, width, tiling):
    pipeline = small_pipeline("cogvideox-small")
    if tiling:
        pipeline.vae.enable_tiling()
    size = {"height": height, "width": width, "num_frames": 9}
    video = output_tensor(pipeline(**(call_kwargs("cogvideox-small") | size)))
    assert video.shape == (1, 9, 3, height, width)


def test_the_full_size_has_the_parameters_of_stable_diffusion_15():
    with torch.device("meta"):
        pipeline = make_pipeline.build("sd15")
    assert _counts(pipeline) == {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float16}
    assert pipeline.safety_checker is None
    assert pipeline.vae_scale_factor == 8


def test_building_leaves_the_random_numbers_of_the_caller_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    make_pipeline.build("flux-small")
    assert torch.equal(torch.rand(4), expected)


def test_save_takes_an_empty_folder_and_missing_parents(tmp_path):
    target = tmp_path / "a" / "b"
    target.mkdir(parents=True)
    for folder in (target, tmp_path / "c" / "d"):
        assert make_pipeline.save("cogvideox-small", folder) == folder
        assert (folder / "model_index.json").is_file()
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        assert folder.stat().st_mode & 0o777 == tmp_path.joinpath("a").stat().st_mode & 0o777


def test_a_broken_run_leaves_nothing(tmp_path, monkeypatch):
    def break_halfway(self, folder, **_):
        Path(folder).mkdir()
        raise OSError("no space left on device")

    monkeypatch.setattr("diffusers.CogVideoXPipeline.save_pretrained", break_halfway)
    with pytest.raises(OSError, match="no space"):
        make_pipeline.save("cogvideox-small", tmp_path / "pipeline")
    assert list(tmp_path.iterdir()) == []
    assert make_pipeline.main(["cogvideox-small", str(tmp_path / "pipeline")]) == 1


def test_an_unknown_kind_or_dtype_is_refused():
    with pytest.raises(UsageError, match="'sd99' is not a kind of pipeline: choose one of sd15, sd15-small"):
        make_pipeline.build("sd99")
    with pytest.raises(UsageError, match="'int8' is not a dtype"):
        make_pipeline.build("sd15-small", dtype="int8")


class TestCommand:
    @pytest.fixture
    def taken(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        return tmp_path

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["sd99", "{new}"], "sd99"),
            (["sd15-small", "{taken}"], "exists and is not an empty folder"),
            (["sd15-small", "{taken}/notes.txt"], "exists and is not an empty folder"),
            (["sd15-small", "{new}", "--dtype", "int8"], "int8"),
            (["sd15-small", "{new}", "--seed", "x"], "x"),
            (["sd15-small"], "FOLDER"),
            ([], "KIND"),
        ],
    )
    def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(self, taken, capsys, arguments, says):
        new = taken / "new"
        code = make_pipeline.main([argument.format(taken=taken, new=new) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 2
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert says in captured.err
        assert [path.name for path in taken.iterdir()] == ["notes.txt"]

    def test_as_a_script_it_says_where_the_pipeline_is(self, tmp_path):
        script = [
            sys.executable,
            make_pipeline.__file__,
            "cogvideox-small",
            "pipeline",
            "--dtype",
            "bfloat16",
        ]
        done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        # Libraries that are installed beside may talk there when diffusers imports them: torchao, bitsandbytes.
        ours = [line for line in done.stderr.splitlines() if line.startswith(("error:", "Traceback"))]
        assert ours == []
        assert done.stdout.strip() == str(tmp_path / "pipeline")
        assert (tmp_path / "pipeline" / "model_index.json").is_file()

    def test_as_a_script_a_mistake_is_one_line(self, tmp_path):
        script = [sys.executable, make_pipeline.__file__, "sd99", "pipeline"]
        done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
