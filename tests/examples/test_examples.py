"""The examples, each run on small pipelines as its first line says."""

from __future__ import annotations

import importlib
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner
from nbclient import NotebookClient
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZE = ("--height", "64", "--width", "64", "--steps", "2")


def printed(name, *arguments):
    """What the example prints; it must end well."""
    result = CliRunner().invoke(importlib.import_module(name).main, [*map(str, arguments), *SIZE])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def colours(path):
    with Image.open(path) as picture:
        assert picture.size == (64, 64)
        return len(picture.convert("RGB").getcolors(64 * 64))


def test_image(small_folder, tmp_path):
    out = printed("image", small_folder("sd15-small"), tmp_path / "fox.png")
    assert "StableDiffusionPipeline" in out
    assert colours(tmp_path / "fox.png") > 100


def test_video_with_cogvideox(small_folder, tmp_path):
    out = printed("cogvideox", small_folder("cogvideox-small"), tmp_path / "panda.mp4", "--frames", 9)
    assert "64 x 64 x 9 frames" in out
    assert b"ftyp" in (tmp_path / "panda.mp4").read_bytes()[:16]


def test_a_lora_is_in_the_plan(small_folder, small_pipeline, tmp_path):
    import peft

    pipe = small_pipeline("sd15-small")
    pipe.unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    pipe.save_lora_weights(tmp_path, unet_lora_layers=peft.utils.get_peft_model_state_dict(pipe.unet))
    count = sum(tensor.numel() for name, tensor in pipe.unet.named_parameters() if "lora" in name)
    out = printed("lora", small_folder("sd15-small"), tmp_path, tmp_path / "fox.png")
    assert f"the LoRA weighs {count * 2:,} bytes" in out  # bfloat16
    assert colours(tmp_path / "fox.png") > 100


def test_two_pipelines_share_their_components(small_folder, tmp_path):
    first, second = tmp_path / "fox.png", tmp_path / "again.png"
    out = printed("shared_components", small_folder("sd15-small"), first, second)
    assert "StableDiffusionPipeline" in out
    assert "StableDiffusionImg2ImgPipeline" in out
    assert colours(first) > 100
    assert colours(second) > 100
    assert first.read_bytes() != second.read_bytes()


@pytest.fixture(scope="module")
def notebook():
    """The notebook after all of its cells were run, by a kernel of its own."""
    read = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in read.cells), "kept without what it shows"
    return NotebookClient(read, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()


def test_the_notebook_runs_and_shows_itself(notebook):
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pages = [output["data"]["text/html"] for output in shown if "text/html" in output.get("data", {})]
    assert len(pages) == 4  # the machine, two plans, a simulation
    assert "FluxPipeline" in pages[1]
    assert "<img" in pages[3]  # the memory over the call
    assert any("image/png" in output.get("data", {}) for output in shown)  # what was generated
