"""Checkpoints in one file: told by their header, with a profile's configurations; what they are not is told too."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.support.hub import write_header
from vramplan.errors import UsageError, VramplanError
from vramplan.pipeline.build import build_weightless
from vramplan.pipeline.describe import describe
from vramplan.profiles.catalogue import load_pipeline_profile

# As from_single_file renames them (diffusers 0.42, convert_z_image_transformer_checkpoint_to_diffusers).
RENAMED = {
    "all_final_layer.2-1.": "final_layer.",
    "all_x_embedder.2-1.": "x_embedder.",
    ".attention.to_out.0.": ".attention.out.",
    ".attention.norm_k.": ".attention.k_norm.",
    ".attention.norm_q.": ".attention.q_norm.",
}


def original(name: str) -> str:
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return f"model.diffusion_model.{name}"


@pytest.fixture(scope="module")
def shapes() -> dict[str, list[int]]:
    """Z-Image's transformer under its own names, queries, keys and values in one."""
    part = load_pipeline_profile("z-image-turbo").components["transformer"]
    module = build_weightless(part.library, part.class_name, part.config)
    found = {original(name): list(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in [name for name in found if ".attention.to_q." in name]:
        parts = [found.pop(name.replace("to_q", part)) for part in ("to_q", "to_k", "to_v")]
        found[name.replace("to_q", "qkv")] = [sum(shape[0] for shape in parts), *parts[0][1:]]
    return found


def saved(path: Path, shapes: dict[str, list[int]], dtype: str = "BF16", width: int = 2) -> str:
    write_header(path, {name: (shape, dtype, width) for name, shape in shapes.items()})
    return str(path)


def test_a_checkpoint_is_planned_for_as_its_pipeline(tmp_path: Path, shapes: dict[str, list[int]]) -> None:
    found = describe(saved(tmp_path / "z.safetensors", shapes))
    profile = describe("z-image-turbo")
    assert found.spec.components == profile.spec.components
    assert found.defaults == profile.defaults
    (note,) = found.spec.notes
    assert note.startswith(f"{tmp_path / 'z.safetensors'} holds the transformer of ZImagePipeline (")
    assert ", bfloat16)" in note


def test_its_own_dtype_is_loaded_and_another_kind_is_not(tmp_path: Path, shapes: dict[str, list[int]]) -> None:
    half = describe(saved(tmp_path / "half.safetensors", shapes, "F16"))
    assert {component.dtype for component in half.spec.components} == {"float16"}
    eight = describe(saved(tmp_path / "eight.safetensors", shapes, "F8_E4M3", 1))
    assert {component.dtype for component in eight.spec.components} == {"bfloat16"}
    assert "float8_e4m3fn" in eight.spec.notes[0]
    told = describe(str(tmp_path / "eight.safetensors"), dtype="float32")
    assert {component.dtype for component in told.spec.components} == {"float32"}


def test_one_that_lacks_a_tensor_or_has_another_shape_is_refused(tmp_path: Path, shapes: dict[str, list[int]]) -> None:
    last = next(name for name in reversed(shapes) if "layers.29" in name)
    less = {name: shape for name, shape in shapes.items() if name != last}
    with pytest.raises(VramplanError, match="does not hold this ZImageTransformer2DModel: 3 of its"):
        describe(saved(tmp_path / "less.safetensors", less))
    other = shapes | {last: [size + 1 for size in shapes[last]]}
    with pytest.raises(VramplanError, match="in the file"):
        describe(saved(tmp_path / "other.safetensors", other))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"lora.weight": [1]}, "its 1 tensors belong to no checkpoint that diffusers knows"),
        ({"joint_blocks.0.context_block.adaLN_modulation.1.bias": [9216]}, "not a checkpoint that diffusers knows"),
        ({"edm_mean": [4]}, "is a checkpoint of playgroundai/playground-v2.5-1024px-aesthetic, and no profile has"),
        ({"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": [1]}, "UNet2DConditionModel"),
    ],
)
def test_what_is_something_else_is_told(tmp_path: Path, names: dict[str, list[int]], words: str) -> None:
    with pytest.raises(VramplanError, match=words) as caught:
        describe(saved(tmp_path / "odd.safetensors", names))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(VramplanError, match=r"none\.safetensors is missing"):
        describe(str(tmp_path / "none.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(VramplanError, match="not a readable safetensors file"):
        describe(str(tmp_path / "cut.safetensors"))
    for options in ({"variant": "fp16"}, {"revision": "main"}):
        with pytest.raises(UsageError, match="has none to choose from"):
            describe(str(tmp_path / "none.safetensors"), **options)


def test_a_gguf_file_is_a_part_of_a_pipeline() -> None:
    with pytest.raises(UsageError, match=r'`settings=\{"weights.transformer": "gguf:file=flux\.gguf"\}`'):
        describe("flux.gguf")
