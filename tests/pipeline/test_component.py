"""What one component says of itself: its role, its limits, its hooks."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel, VQModel
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from transformers import CLIPTextConfig, CLIPTextModel

from vramplan.pipeline.component import describe_component, device_of, hooks_of, role_of
from vramplan.pipeline.live import spec_from_pipeline


@pytest.mark.parametrize(
    ("name", "library", "class_name", "role"),
    [
        ("text_encoder", "transformers", "T5EncoderModel", "text_encoder"),
        ("text_encoder_3", "transformers", "T5EncoderModel", "text_encoder"),
        ("prior_text_encoder", "transformers", "CLIPTextModelWithProjection", "text_encoder"),
        ("text_encoder", "transformers", "Qwen2_5_VLForConditionalGeneration", "text_encoder"),
        ("bert", "diffusers", "LDMBertModel", "text_encoder"),
        ("image_encoder", "transformers", "CLIPVisionModelWithProjection", "image_encoder"),
        ("siglip", "transformers", "Siglip2VisionModel", "image_encoder"),
        ("safety_checker", "stable_diffusion", "StableDiffusionSafetyChecker", "other"),
        ("safety_checker", "transformers", "CLIPVisionModel", "other"),
        ("controlnet", "diffusers", "MultiControlNetModel", "control"),
        ("controlnet", "diffusers", "QwenImageControlNetModel", "control"),
        ("adapter", "diffusers", "T2IAdapter", "control"),
        ("unet", "diffusers", "UNet2DConditionModel", "denoiser"),
        ("transformer_2", "diffusers", "WanTransformer3DModel", "denoiser"),
        ("prior", "diffusers", "PriorTransformer", "denoiser"),
        ("transformer", "diffusers", "DiTTransformer2DModel", "denoiser"),
        ("motion_adapter", "diffusers", "MotionAdapter", "other"),
        ("vae", "diffusers", "AutoencoderKLWan", "vae"),
        ("vae", "diffusers", "AutoencoderTiny", "vae"),
        ("movq", "diffusers", "VQModel", "vae"),
        ("vqvae", "diffusers", "VQModel", "vae"),
        ("vocoder", "transformers", "SpeechT5HifiGan", "other"),
    ],
)
def test_the_role_follows_from_name_and_class(name: str, library: str, class_name: str, role: str) -> None:
    assert role_of(name, library, class_name) == role


@pytest.fixture(scope="module")
def encoder() -> CLIPTextModel:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=20, projection_dim=16, **sizes))


def small_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(0, 2, 2),
    )  # fmt: skip


def test_a_class_that_forbids_group_offload_says_so() -> None:
    with torch.device("meta"):
        module = VQModel()
    assert "_supports_group_offloading is False" in str(describe_component("movq", module).group_offload_refusal)
    assert describe_component("transformer", small_transformer()).group_offload_refusal is None


def test_a_multihead_attention_anywhere_forbids_leaves() -> None:
    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.MultiheadAttention(4, 2))

    assert "torch.nn.MultiheadAttention" in str(describe_component("image_encoder", Head()).leaf_offload_refusal)
    assert describe_component("transformer", small_transformer()).leaf_offload_refusal is None


def test_whoever_reads_attention_weights_without_a_call_is_refused() -> None:
    """HunyuanDiT's attention pool hands its projections' weights to torch.nn.functional."""
    from diffusers.models.embeddings import HunyuanDiTAttentionPool

    described = describe_component("transformer", HunyuanDiTAttentionPool(4, 32, 2))
    assert "HunyuanDiTAttentionPool" in str(described.leaf_offload_refusal)
    assert described.sequential_offload_refusal == described.leaf_offload_refusal


def test_old_weight_norm_excludes_sequential_offload_alone() -> None:
    normed = torch.nn.Sequential(torch.nn.utils.weight_norm(torch.nn.Conv1d(2, 2, 1)))
    described = describe_component("vae", normed)
    assert "weight_norm" in str(described.sequential_offload_refusal)
    assert described.leaf_offload_refusal is None


@pytest.mark.parametrize(
    ("dtype", "force", "bytes_"), [("float16", True, 4), ("float16", False, 2), ("bfloat16", True, 2)]
)
def test_a_float16_vae_that_is_upcast_computes_in_four_bytes(dtype: str, force: bool, bytes_: int) -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(force_upcast=force).to(getattr(torch, dtype))
    assert describe_component("vae", vae).element_bytes == bytes_


def test_eight_bit_weights_do_not_move(encoder: CLIPTextModel) -> None:
    encoder.is_loaded_in_8bit = True
    try:
        assert "8 bit" in str(describe_component("text_encoder", encoder).move_refusal)
    finally:
        del encoder.is_loaded_in_8bit
    assert describe_component("text_encoder", encoder).move_refusal is None


def test_the_config_is_plain_and_without_private_keys(encoder: CLIPTextModel) -> None:
    for module in (encoder, small_transformer()):
        config = describe_component("x", module).config
        assert config
        assert not [key for key in config if key.startswith("_")]


def test_the_device_is_that_of_the_largest_tensor() -> None:
    module = torch.nn.Module()
    module.big = torch.nn.Parameter(torch.zeros(10, device="meta"))
    module.small = torch.nn.Parameter(torch.zeros(2))
    assert device_of(module) == "meta"
    assert device_of(torch.nn.ReLU()) is None


class TestHooks:
    def test_none(self, small_pipeline) -> None:
        assert {component.hooks for component in spec_from_pipeline(small_pipeline("sd15-small")).components} == {()}

    def test_model_offload(self, small_pipeline) -> None:
        pipe = small_pipeline("sd15-small")
        pipe.enable_model_cpu_offload(device="cpu")
        assert {component.hooks for component in spec_from_pipeline(pipe).components} == {("model_cpu_offload",)}

    def test_sequential_offload(self) -> None:
        from accelerate import cpu_offload

        module = small_transformer()
        cpu_offload(module, torch.device("meta"))
        assert hooks_of(module) == ("sequential_cpu_offload",)

    @pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
    def test_group_offload(self, kind: str) -> None:
        module = small_transformer()
        apply_group_offloading(module, torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)
        assert hooks_of(module) == ("group_offloading",)

    def test_layerwise_casting(self) -> None:
        module = small_transformer()
        before = describe_component("transformer", module).weight_bytes
        apply_layerwise_casting(module, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert hooks_of(module) == ("layerwise_casting",)
        after = describe_component("transformer", module)
        assert after.weight_bytes < before
        assert "float8_e4m3fn" in after.dtype_bytes

    def test_a_weightless_component_carries_none(self) -> None:
        module = small_transformer()
        apply_group_offloading(module, torch.device("cpu"), offload_type="leaf_level")
        assert describe_component("transformer", module).hooks == ()


def test_a_live_component_tells_its_device(small_pipeline) -> None:
    spec = spec_from_pipeline(small_pipeline("flux-small"))
    assert {component.device for component in spec.components} == {"cpu"}


def test_a_map_over_several_devices_is_seen_and_a_single_one_is_not(small_pipeline) -> None:
    pipe = small_pipeline("sd15-small")
    for device_map, seen in ((None, False), ("balanced", False), ({"unet": 0}, False), ({"unet": 0, "vae": 1}, True)):
        pipe.hf_device_map = device_map
        assert (spec_from_pipeline(pipe).device_map is not None) is seen


def test_the_instance_may_exclude_more_than_its_class(small_pipeline) -> None:
    pipe = small_pipeline("sd15-small")
    pipe._exclude_from_cpu_offload = ["vae", "not_there"]
    assert spec_from_pipeline(pipe).excluded == {"vae"}


def test_the_compute_width_of_a_unet_is_its_dtypes(small_pipeline) -> None:
    assert spec_from_pipeline(small_pipeline("sd15-small")).component("unet").element_bytes == 4
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, attention_head_dim=2)
    assert describe_component("unet", unet.to(torch.bfloat16)).element_bytes == 2
