"""The bytes of a pipeline from a folder are those of the pipeline once loaded, to the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from make_pipeline import SMALL_KINDS
from transformers import T5EncoderModel, UMT5EncoderModel

from tests.support.profiles import profile_spec
from vramplan.pipeline.build import build_weightless
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.dtypes import cast_as_loaded, load_dtype
from vramplan.pipeline.folder import spec_from_folder
from vramplan.pipeline.geometry import power_of_two, tensor_bytes, tensors_of
from vramplan.pipeline.live import spec_from_pipeline
from vramplan.pipeline.modules import modules_of
from vramplan.pipeline.types import PipelineSpec
from vramplan.planfile.types import fingerprint
from vramplan.profiles.catalogue import load_pipeline_profile, pipeline_names

DTYPES = ("float32", "float16", "bfloat16")
T5_CONFIG = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def loaded(small_pipeline: Callable[..., Any]) -> Callable[[str, str], Any]:
    return cache(lambda kind, dtype: small_pipeline(kind, dtype=getattr(torch, dtype)))


@pytest.fixture(scope="module")
def described(small_folder: Callable[[str], Any]) -> Callable[[str, str], PipelineSpec]:
    return cache(lambda kind, dtype: spec_from_folder(small_folder(kind), dtype=dtype))


def counted(module: torch.nn.Module) -> int:
    """By hand: every distinct parameter and buffer, once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def dtypes(module: torch.nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in (*module.named_parameters(), *module.named_buffers())}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_a_folder_is_described_as_the_pipeline_it_loads_to(kind, dtype, loaded, described) -> None:
    live = spec_from_pipeline(loaded(kind, dtype))
    saved = described(kind, dtype)
    assert {c.name for c in live.components} == {c.name for c in saved.components}
    assert fingerprint(live) == fingerprint(saved)
    for ours in saved.components:
        real = live.component(ours.name)
        for what in ("class_name", "role", "weight_bytes", "parameter_count", "dtype", "dtype_bytes", "geometry"):
            assert getattr(ours, what) == getattr(real, what), (ours.name, what)
        assert (ours.tiling, ours.slicing, ours.element_bytes) == (real.tiling, real.slicing, real.element_bytes)
    assert (saved.uses, saved.sequence, saved.excluded) == (live.uses, live.sequence, live.excluded)
    assert saved.notes == ()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_the_bytes_are_the_sum_over_the_real_tensors(kind, dtype, loaded, described) -> None:
    for name, module in modules_of(loaded(kind, dtype)).items():
        component = described(kind, dtype).component(name)
        assert component.weight_bytes == counted(module) == sum(component.dtype_bytes.values())
        assert component.parameter_count == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_every_tensor_gets_the_dtype_that_loading_gives_it(kind, dtype, loaded, small_folder) -> None:
    for name, module in modules_of(loaded(kind, dtype)).items():
        library, class_name = json.loads((small_folder(kind) / "model_index.json").read_text())[name]
        config = json.loads((small_folder(kind) / name / "config.json").read_text())
        ours = build_weightless(library, class_name, config)
        cast_as_loaded(ours, dtype)
        assert dtypes(ours) == dtypes(module)
        assert all(tensor.device.type == "meta" for tensor in tensors_of(ours))


def test_t5_keeps_wo_in_float32_when_loaded_in_float16(loaded, described) -> None:
    module = loaded("flux-small", "float16").text_encoder_2
    kept = {name for name, dtype in dtypes(module).items() if dtype == torch.float32}
    assert kept
    assert all(name.endswith("wo.weight") for name in kept)
    component = described("flux-small", "float16").component("text_encoder_2")
    assert component.dtype_bytes["float32"] == sum(4 * module.get_parameter(name).numel() for name in kept)
    assert component.dtype == "float16"
    in_bfloat16 = described("flux-small", "bfloat16").component("text_encoder_2")
    assert set(in_bfloat16.dtype_bytes) == {"bfloat16"}
    assert in_bfloat16.weight_bytes < component.weight_bytes


@pytest.mark.parametrize("cls", [T5EncoderModel, UMT5EncoderModel])
def test_the_embedding_t5_shares_is_counted_once(cls) -> None:
    real = cls(cls.config_class(**T5_CONFIG))
    assert real.shared.weight is real.encoder.embed_tokens.weight
    weightless = build_weightless("transformers", cls.__name__, real.config.to_dict())
    ours = describe_component("text_encoder", weightless)
    assert ours.weight_bytes == counted(real)
    assert ours.geometry == describe_component("text_encoder", real).geometry
    assert ours.geometry.rest_bytes + sum(ours.geometry.blocks) == ours.weight_bytes


def test_buffers_that_are_not_saved_keep_their_own_dtype_and_are_counted(tmp_path) -> None:
    from diffusers import SD3Transformer2DModel

    sizes = {"sample_size": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    sizes |= {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16}
    SD3Transformer2DModel(**sizes, pos_embed_max_size=8).save_pretrained(tmp_path)
    real = SD3Transformer2DModel.from_pretrained(tmp_path, dtype=torch.float16)
    ours = build_weightless("diffusers", "SD3Transformer2DModel", json.loads((tmp_path / "config.json").read_text()))
    cast_as_loaded(ours, "float16")
    assert dtypes(ours) == dtypes(real)
    assert describe_component("transformer", ours).weight_bytes == counted(real)


class Holder(torch.nn.Module):
    """One saved and one computed buffer beside a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, device="meta"))
        self.register_buffer("kept", torch.zeros(5, device="meta"))
        self.register_buffer("computed", torch.zeros(7, device="meta"), persistent=False)
        self.register_buffer("places", torch.zeros(2, dtype=torch.int64, device="meta"))


def test_casting_leaves_computed_buffers_and_whole_numbers_alone() -> None:
    module = Holder()
    cast_as_loaded(module, "bfloat16")
    assert dtypes(module) == {
        "weight": torch.bfloat16,
        "kept": torch.bfloat16,
        "computed": torch.float32,
        "places": torch.int64,
    }
    assert describe_component("x", module).weight_bytes == 2 * 3 + 2 * 5 + 4 * 7 + 8 * 2


def test_mixed_dtypes_are_told_apart(loaded) -> None:
    module = loaded("sd15-small", "float32").unet
    half = module.conv_in.weight.numel() * 2
    module.conv_in.weight.data = module.conv_in.weight.data.half()
    try:
        component = describe_component("unet", module)
    finally:
        module.conv_in.weight.data = module.conv_in.weight.data.float()
    assert component.dtype == "float32"  # of the most bytes
    assert component.dtype_bytes["float16"] == half
    assert component.weight_bytes == counted(module) - half


def test_a_module_stored_in_parts_of_two_dtypes_keeps_the_dtype_of_most(small_pipeline, tmp_path) -> None:
    small_pipeline("flux-small", dtype=torch.float16).save_pretrained(tmp_path / "half")
    spec = spec_from_folder(tmp_path / "half")
    encoder = spec.component("text_encoder_2")
    assert (encoder.dtype, encoder.converted_at_load) == ("float16", False)
    assert set(encoder.dtype_bytes) == {"float16", "float32"}


def test_a_quantized_wrapper_is_counted_by_its_inner_tensors() -> None:
    class Wrapped:
        tensor_data_names = ("data", "scale")
        data = torch.zeros(10, dtype=torch.int8)
        scale = torch.zeros(2, dtype=torch.float32)

    assert tensor_bytes(Wrapped()) == 10 + 8


def test_pinned_copies_are_rounded_up_tensor_by_tensor(loaded) -> None:
    for module in modules_of(loaded("sd15-small", "float16")).values():
        expected = sum(power_of_two(tensor.numel() * tensor.element_size()) for tensor in tensors_of(module))
        assert describe_component("x", module).geometry.pinned_bytes == expected
    assert [power_of_two(count) for count in (0, 1, 2, 3, 72 << 20)] == [0, 1, 2, 4, 128 << 20]


@pytest.mark.parametrize("name", pipeline_names())
def test_a_profile_weighs_as_many_parameters_as_published(name: str) -> None:
    profile = load_pipeline_profile(name)
    spec = profile_spec(name)
    counts = {part: told.parameters for part, told in profile.components.items() if told.parameters is not None}
    assert {component.name: component.parameter_count for component in spec.components} == counts
    assert spec.weight_bytes >= 2 * sum(counts.values())
    assert (spec.family, str(spec.source)) == (name, f"profile:{name}")


@pytest.mark.parametrize(("short", "name"), [("bf16", "bfloat16"), ("torch.half", "float16"), ("FP32", "float32")])
def test_a_dtype_may_be_given_in_short(short: str, name: str) -> None:
    assert load_dtype(short) == name


def test_a_dtype_nobody_loads_in_is_refused() -> None:
    from vramplan.errors import UsageError

    with pytest.raises(UsageError, match="int8"):
        load_dtype("int8")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_diffusers_keeps_in_float32_is_known(dtype: str, tmp_path) -> None:
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 1}
    WanTransformer3DModel(**sizes, text_dim=8, freq_dim=8, ffn_dim=16).save_pretrained(tmp_path)
    real = WanTransformer3DModel.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    ours = build_weightless("diffusers", "WanTransformer3DModel", json.loads((tmp_path / "config.json").read_text()))
    cast_as_loaded(ours, dtype)
    assert dtypes(ours) == dtypes(real)
    assert torch.float32 in dtypes(real).values()
