"""A folder that is not, or not quite, a saved pipeline: one sentence each, and nothing of it is run."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vramplan.errors import VramplanError
from vramplan.pipeline.folder import INDEX, spec_from_folder, stored_weights
from vramplan.pipeline.live import spec_from_pipeline
from vramplan.pipeline.repository import FolderRepository

KIND = "sd15-small"
UNET = "unet/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"


@pytest.fixture
def folder(small_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(small_folder(KIND), tmp_path / "pipeline"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, words: str, **options: Any) -> str:
    with pytest.raises(VramplanError, match=words) as caught:
        spec_from_folder(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert str(tmp_path / "nothing") in refused(tmp_path / "nothing", "no such folder")


def test_a_folder_without_an_index(tmp_path: Path) -> None:
    refused(tmp_path, "no model_index.json: it is not a saved diffusers pipeline")


@pytest.mark.parametrize("text", ["", "{", "\x00\x01", "[1, 2]", '"text"', "null"])
def test_an_index_that_is_damaged(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    assert INDEX in refused(folder, "not readable JSON|expected an object")


def test_an_index_that_is_not_text(folder: Path) -> None:
    (folder / INDEX).write_bytes(b"\xff\xfe\x00")
    refused(folder, "not readable JSON")


@pytest.mark.parametrize(
    "name", ["NoSuchPipeline", "AutoencoderKL", "utils", None, 5, ["my_pipeline", "MyPipeline"], "FluxModularPipeline"]
)
def test_a_class_that_is_no_pipeline_of_diffusers(folder: Path, name: Any) -> None:
    """Custom code comes as a list of a file and a class: it is not run."""
    edit(folder / INDEX, _class_name=name)
    refused(folder, "is not a pipeline class of diffusers")


def test_a_component_of_a_foreign_library_is_not_imported(folder: Path, monkeypatch) -> None:
    package = folder / "somebodys_code"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(folder))
    edit(folder / INDEX, unet=["somebodys_code", "Model"])
    refused(folder, "somebodys_code.Model is not a class of diffusers or transformers")
    assert "somebodys_code" not in sys.modules


@pytest.mark.parametrize(
    "entry", [["os", "system"], ["diffusers", "NoSuchModel"], ["diffusers", "utils"], ["transformers", ""], ["", "x"]]
)
def test_a_component_that_is_no_class_of_the_libraries(folder: Path, entry: list[str]) -> None:
    edit(folder / INDEX, unet=entry)
    refused(folder, "is not a class of diffusers or transformers")


@pytest.mark.parametrize("entry", [[1, 2], ["diffusers", 5], [["diffusers"], "UNet2DConditionModel"]])
def test_a_component_entry_that_is_not_two_names(folder: Path, entry: list[Any]) -> None:
    edit(folder / INDEX, unet=entry)
    refused(folder, "unet must name a library and a class")


def test_a_component_that_was_left_out_is_left_out(folder: Path) -> None:
    edit(folder / INDEX, vae=[None, None])
    names = [component.name for component in spec_from_folder(folder).components]
    assert sorted(names) == ["text_encoder", "unet"]


def test_a_component_without_a_folder(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    assert "vae" in refused(folder, "config.json is missing")


def test_a_component_without_a_config(folder: Path) -> None:
    (folder / "unet" / "config.json").unlink()
    refused(folder, "unet.config.json is missing")


@pytest.mark.parametrize("keep", [0, 4, 8, 100])
def test_a_file_cut_off_within_its_header(folder: Path, keep: int) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:keep])
    assert UNET in refused(folder, "not a readable safetensors file")


@pytest.mark.parametrize("file", [UNET, ENCODER])
def test_a_file_cut_off_within_its_tensors(folder: Path, file: str) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:-1])
    assert file in refused(folder, "the file ends before its tensors do")


def test_a_header_that_promises_more_than_there_is(folder: Path) -> None:
    (folder / UNET).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused(folder, "not a readable safetensors file")


def test_a_pointer_file_in_place_of_weights(folder: Path) -> None:
    (folder / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1000\n")
    refused(folder, "not a readable safetensors file")


def test_pickled_weights_are_refused_unless_trusted(folder: Path) -> None:
    (folder / UNET).unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    refused(folder, "pass `allow_pickle=True`")
    spec = spec_from_folder(folder, allow_pickle=True)
    assert spec.component("unet").weight_bytes > 0
    assert [note for note in spec.notes if note.startswith("unet: ") and "pickles" in note]


def test_a_quantized_component_is_sent_to_the_live_pipeline(folder: Path) -> None:
    edit(folder / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    refused(folder, "auto_configure")


def test_files_that_do_not_hold_what_the_class_has_are_noted(folder: Path) -> None:
    edit(folder / "unet" / "config.json", block_out_channels=[16, 32, 64, 128])
    (note,) = spec_from_folder(folder).notes
    assert note.startswith("unet: its files hold")
    assert "UNet2DConditionModel has" in note


@pytest.fixture
def sharded(small_pipeline: Callable[..., Any], tmp_path: Path) -> Path:
    small_pipeline(KIND).save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded" / "unet").glob("*.safetensors"))) > 1
    return tmp_path / "sharded"


def test_a_checkpoint_in_shards_weighs_the_same(sharded: Path, folder: Path) -> None:
    ours, whole = spec_from_folder(sharded), spec_from_folder(folder)
    assert ours.notes == ()
    assert {c.name: c.weight_bytes for c in ours.components} == {c.name: c.weight_bytes for c in whole.components}
    assert stored_weights(FolderRepository(sharded), "unet") == stored_weights(FolderRepository(folder), "unet")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted((sharded / "unet").glob("*.safetensors"))[0]
    shard.unlink()
    refused(sharded, f"names {shard.name}, which is missing")


def test_a_damaged_shard_is_named(sharded: Path) -> None:
    shard = sorted((sharded / "unet").glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert shard.name in refused(sharded, "the file ends before its tensors do")


@pytest.mark.parametrize("content", ['{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": null}', "[]"])
def test_a_damaged_shard_index_is_an_error_of_one_line(sharded: Path, content: str) -> None:
    index = next((sharded / "unet").glob("*.index.json"))
    index.write_text(content)
    assert index.name in refused(sharded, "weight_map|expected an object")


@pytest.mark.parametrize(("dtype", "converted"), [(None, False), ("float32", False), ("float16", True)])
def test_a_dtype_that_is_not_the_stored_one_is_converted_while_loading(folder, dtype, converted) -> None:
    spec = spec_from_folder(folder, dtype=dtype)
    assert {component.converted_at_load for component in spec.components} == {converted}
    assert {component.dtype for component in spec.components} == {dtype or "float32"}


def test_without_a_dtype_each_component_keeps_its_own(small_pipeline, tmp_path) -> None:
    pipe = small_pipeline(KIND, dtype={"unet": torch.bfloat16, "default": torch.float32})
    pipe.save_pretrained(tmp_path / "mixed")
    spec, live = spec_from_folder(tmp_path / "mixed"), spec_from_pipeline(pipe)
    assert spec.component("unet").dtype == "bfloat16"
    assert spec.component("vae").dtype == "float32"
    assert spec.weight_bytes == live.weight_bytes


def test_a_safety_checker_of_the_pipelines_own_module_is_found(folder: Path, tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPVisionConfig

    vision = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision.to_dict(), projection_dim=8))
    checker.save_pretrained(folder / "safety_checker")
    edit(folder / INDEX, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    spec = spec_from_folder(folder)
    found = spec.component("safety_checker")
    assert found.role == "other"
    assert found.name in spec.excluded
    assert found.weight_bytes == sum(t.numel() * 4 for t in checker.parameters()) + sum(
        t.numel() * t.element_size() for t in checker.buffers()
    )
