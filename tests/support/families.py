"""Small real pipelines of further families: tiny components of the library's own classes, random weights.

Nothing is downloaded. `FAMILIES` names each one, how to make it, and the workload of a short call.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from make_pipeline import TEXT, clip_tokenizer, small_clip_encoder, t5_tokenizer

from tests.support.pipelines import make_extra
from vramplan.workload import Workload

WIDTH = 16  # of every text encoder that is made here


class Family(NamedTuple):
    """How to make a pipeline and what to ask of it.

    `real` tells whether a real call on the CPU is short; `needs` names a package that a real call cannot do without.
    """

    make: Callable[[], Any]
    workload: Workload
    real: bool = True
    needs: str = "diffusers"


# --- tokenizers and text encoders ------------------------------------------------------------------------

_CHAT = """{% for m in messages %}<|{{ m['role'] }}|> {% if m['content'] is string %}{{ m['content'] }}{% else %}\
{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %} {% endfor %}"""


@cache
def word_tokenizer(length: int = 512) -> transformers.PreTrainedTokenizerFast:
    """One token per word, for encoders whose pipelines take any fast tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    words = sorted({word for line in TEXT for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(line)})
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(specials + words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), specials, strict=True))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=length, chat_template=_CHAT, **named
    )


def chatglm_tokenizer() -> Any:
    """ChatGLM's own class around a sentencepiece model of a few words."""
    import sentencepiece
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "words.txt").write_text("\n".join(TEXT))
        sentencepiece.SentencePieceTrainer.train(
            input=f"{folder}/words.txt", model_prefix=f"{folder}/words", vocab_size=120, minloglevel=2
        )
        return ChatGLMTokenizer(f"{folder}/words.model")


clip_words, t5_words = cache(clip_tokenizer), cache(t5_tokenizer)


def clip(*, pooled: bool = False, **config: Any) -> dict[str, Any]:
    """A CLIP text encoder and its tokenizer."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "projection_dim": WIDTH, "num_hidden_layers": 2}
    encoder = small_clip_encoder(clip_words(), projection=pooled, **(sizes | config))
    return {"text_encoder": encoder, "tokenizer": clip_words()}


def t5(cls: Any = transformers.T5EncoderModel, **config: Any) -> dict[str, Any]:
    """A T5 (or UMT5) encoder and its tokenizer."""
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    made = cls(cls.config_class(vocab_size=len(t5_words()), feed_forward_proj="gated-gelu", **(sizes | config)))
    return {"text_encoder": made, "tokenizer": t5_words()}


umt5 = partial(t5, transformers.UMT5EncoderModel)


def decoder_sizes(layers: int = 2) -> dict[str, Any]:
    """The sizes that configurations of language models have in common."""
    return {
        "vocab_size": len(word_tokenizer()),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def language_model(cls: Any, layers: int = 2, **config: Any) -> dict[str, Any]:
    """A language model as text encoder: Llama, Qwen, Gemma, GLM."""
    return {"text_encoder": cls(cls.config_class(**decoder_sizes(layers), **config)), "tokenizer": word_tokenizer()}


def qwen_vl() -> dict[str, Any]:
    """Qwen2.5-VL, which is given text only."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(
        text_config=decoder_sizes(4) | {"rope_parameters": rope, "intermediate_size": 128}, vision_config=vision
    )
    return {
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config),
        "tokenizer": word_tokenizer(1024),
    }


def mistral3(layers: int) -> dict[str, Any]:
    """Mistral 3, which is given text only."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral"} | decoder_sizes(layers),
        tie_word_embeddings=False,  # as in the model that Flux.2 uses
        vision_config={"model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 8} | vision,
    )
    return {"text_encoder": transformers.Mistral3ForConditionalGeneration(config), "tokenizer": word_tokenizer()}


def chatglm() -> dict[str, Any]:
    """ChatGLM 3, which diffusers brings along."""
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=200, hidden_size=WIDTH, ffn_hidden_size=32, kv_channels=8,
        num_attention_heads=2, seq_length=512, multi_query_attention=True, multi_query_group_num=1, rmsnorm=True,
        post_layer_norm=True, add_bias_linear=False, add_qkv_bias=True, bias_dropout_fusion=True, original_rope=True,
    )  # fmt: skip
    return {"text_encoder": ChatGLMModel(config), "tokenizer": chatglm_tokenizer()}


def numbered(parts: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The same parts as `text_encoder_2` and `tokenizer_2`."""
    return {f"{name}_{number}": part for name, part in parts.items()}


def prefixed(parts: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The same parts as `prior_text_encoder` and `prior_tokenizer`."""
    return {f"{prefix}_{name}": part for name, part in parts.items()}


def clip_vision(image_size: int = 28, patch_size: int = 14) -> transformers.CLIPVisionModelWithProjection:
    """A CLIP vision encoder."""
    sizes = {"hidden_size": WIDTH, "projection_dim": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=image_size, patch_size=patch_size)
    )


def clip_images(size: int = 28) -> transformers.CLIPImageProcessor:
    """What makes a vision encoder's pictures."""
    return transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


# --- what families have in common -------------------------------------------------------------------------


def vae(channels: tuple[int, ...] = (8, 8, 16, 16), **config: Any) -> diffusers.AutoencoderKL:
    """An image autoencoder that reduces by 8 unless `channels` are of another number."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        **({"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64, "latent_channels": 4} | config),
    )


def flow(**config: Any) -> Any:
    """The scheduler of flow matching."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def xl_net(cls: Any, text_width: int, pooled_width: int, **config: Any) -> Any:
    """A UNet or a control net of SDXL's kind."""
    size_channels = 8
    return cls(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        cross_attention_dim=text_width,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=size_channels,
        projection_class_embeddings_input_dim=6 * size_channels + pooled_width,
        **config,
    )


def xl_unet(text_width: int = 2 * WIDTH, pooled_width: int = WIDTH) -> diffusers.UNet2DConditionModel:
    """SDXL's UNet with two blocks."""
    up = ("CrossAttnUpBlock2D", "UpBlock2D")
    return xl_net(diffusers.UNet2DConditionModel, text_width, pooled_width, up_block_types=up, sample_size=8)


def xl_parts() -> dict[str, Any]:
    """SDXL's parts with two blocks in the UNet."""
    return {
        **clip(),
        **numbered(clip(pooled=True), 2),
        "unet": xl_unet(),
        "vae": vae((8, 16)),
        "scheduler": diffusers.EulerDiscreteScheduler(),
    }


def pixel_unet(**config: Any) -> diffusers.UNet2DModel:
    """A UNet of pixels without a text."""
    return diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **config,
    )


def caption_transformer(cls: Any, **config: Any) -> Any:
    """A transformer as of PixArt and Latte, with the captions as they come from T5."""
    return cls(
        num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=WIDTH, in_channels=4,
        cross_attention_dim=16, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, **config,
    )  # fmt: skip


# --- pictures ----------------------------------------------------------------------------------------------


def flux_fill() -> Any:
    return diffusers.FluxFillPipeline(
        **clip(),
        **numbered(t5(), 2),
        transformer=diffusers.FluxTransformer2DModel(
            # packed latents, those of the masked picture, and 8 x 8 mask values for each of 2 x 2 latents
            in_channels=16 + 16 + 256, out_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 6, 6),
            guidance_embeds=True,
        ),
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=flow(use_dynamic_shifting=True),
    )  # fmt: skip


def flux_2() -> Any:
    return diffusers.Flux2Pipeline(
        **mistral3(31),  # the pipeline reads the 10th, 20th and 30th layer
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=3 * WIDTH, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        ),
        vae=diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64
        ),
        scheduler=flow(use_dynamic_shifting=True),
    )  # fmt: skip


def qwen_image() -> Any:
    return diffusers.QwenImagePipeline(
        **qwen_vl(),
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
        ),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
        scheduler=flow(use_dynamic_shifting=True),
    )  # fmt: skip


def z_image() -> Any:
    return diffusers.ZImagePipeline(
        **language_model(transformers.Qwen3Model),
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
            axes_dims=[8, 4, 4], axes_lens=[1024, 32, 32],
        ),
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=flow(use_dynamic_shifting=True),
    )  # fmt: skip


def chroma() -> Any:
    return diffusers.ChromaPipeline(
        **t5(),
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32, approximator_layers=1,
            approximator_num_channels=16,
        ),
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=flow(),
    )  # fmt: skip


def hidream() -> Any:
    return diffusers.HiDreamImagePipeline(
        **clip(pooled=True, max_position_embeddings=128),
        **numbered(clip(pooled=True, max_position_embeddings=128), 2),
        **numbered(t5(), 3),
        **numbered(language_model(transformers.LlamaForCausalLM), 4),
        transformer=diffusers.HiDreamImageTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=4, caption_channels=[WIDTH, WIDTH], text_emb_dim=2 * WIDTH, num_routed_experts=4,
            num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
        ),
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=flow(),
    )  # fmt: skip


def pixart_sigma() -> Any:
    return diffusers.PixArtSigmaPipeline(
        **t5(),
        transformer=caption_transformer(diffusers.PixArtTransformer2DModel, sample_size=32),  # pictures of 256 x 256
        vae=vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def sana() -> Any:
    blocks, channels = ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2, (4, 4, 8, 8, 8, 8)
    return diffusers.SanaPipeline(
        **language_model(transformers.Gemma2Model),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
            sample_size=16,
        ),
        vae=diffusers.AutoencoderDC(
            latent_channels=4, attention_head_dim=4, encoder_block_types=blocks, decoder_block_types=blocks,
            encoder_block_out_channels=channels, decoder_block_out_channels=channels,
            encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=((),) * 4 + ((5,),) * 2, decoder_qkv_multiscales=((),) * 4 + ((5,),) * 2,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )  # fmt: skip


def lumina_2() -> Any:
    return diffusers.Lumina2Pipeline(
        **language_model(transformers.Gemma2Model),
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
            num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(300, 64, 64), cap_feat_dim=WIDTH,
        ),
        vae=vae(shift_factor=0.1159),
        scheduler=flow(),
    )  # fmt: skip


def aura_flow() -> Any:
    return diffusers.AuraFlowPipeline(
        **umt5(),
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=2, attention_head_dim=8,
            num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=WIDTH, out_channels=4,
            pos_embed_max_size=64,
        ),
        vae=vae(),
        scheduler=flow(),
    )  # fmt: skip


def kolors() -> Any:
    return diffusers.KolorsPipeline(
        **chatglm(), unet=xl_unet(WIDTH, WIDTH), vae=vae((8, 16)), scheduler=diffusers.EulerDiscreteScheduler()
    )


def hunyuan_dit() -> Any:
    bert = transformers.BertConfig(
        vocab_size=len(word_tokenizer()), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    return diffusers.HunyuanDiTPipeline(
        text_encoder=transformers.BertModel(bert),
        tokenizer=word_tokenizer(77),
        **numbered(t5(), 2),
        transformer=diffusers.HunyuanDiT2DModel(
            sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=16, hidden_size=16,
            activation_fn="gelu-approximate",
        ),
        vae=vae((4, 4, 4, 4)),
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def cogview_4() -> Any:
    return diffusers.CogView4Pipeline(
        **language_model(transformers.GlmModel),
        transformer=diffusers.CogView4Transformer2DModel(
            in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
            text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4,
        ),
        vae=vae(),
        scheduler=flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"),
    )  # fmt: skip


def stable_cascade() -> Any:
    from diffusers.models.unets import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    layers = {"down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1)}
    net = partial(StableCascadeUNet, conditioning_dim=16, block_out_channels=(16, 16), **layers)
    attends = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    return diffusers.StableCascadeCombinedPipeline(
        **clip(pooled=True),
        decoder=net(
            in_channels=4, out_channels=4, num_attention_heads=(-1, 2), block_types_per_layer=(attends[:2], attends),
            clip_text_pooled_in_channels=WIDTH, effnet_in_channels=4, pixel_mapper_in_channels=3, patch_size=2,
        ),
        vqgan=PaellaVQModel(
            bottleneck_blocks=1, num_vq_embeddings=8, embed_dim=16
        ),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        **prefixed(clip(pooled=True), "prior"),
        prior_prior=net(
            in_channels=4, out_channels=4, num_attention_heads=(2, 2), clip_image_in_channels=WIDTH,
            clip_text_in_channels=WIDTH, clip_text_pooled_in_channels=WIDTH, switch_level=(False,),
        ),
        prior_scheduler=diffusers.DDPMWuerstchenScheduler(),
    )  # fmt: skip


def kandinsky_2_2() -> Any:
    cross = {"encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}
    return diffusers.KandinskyV22CombinedPipeline(
        unet=diffusers.UNet2DConditionModel(
            **cross, in_channels=4, out_channels=8, block_out_channels=(32, 32), layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            cross_attention_dim=16, attention_head_dim=4, resnet_time_scale_shift="scale_shift",
        ),
        scheduler=diffusers.DDPMScheduler(variance_type="learned_range"),
        movq=diffusers.VQModel(
            block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4,
            norm_type="spatial", num_vq_embeddings=8, vq_embed_dim=4,
        ),
        prior_prior=diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_layers=2
        ),
        prior_image_encoder=clip_vision(),
        **prefixed(clip(pooled=True), "prior"),
        prior_scheduler=diffusers.UnCLIPScheduler(prediction_type="sample", variance_type="fixed_small_log"),
        prior_image_processor=clip_images(),
    )  # fmt: skip


def deep_floyd() -> Any:
    return diffusers.IFPipeline(
        **t5(),
        unet=diffusers.UNet2DConditionModel(
            sample_size=16, in_channels=3, out_channels=6, layers_per_block=1, block_out_channels=(32, 32),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", attention_head_dim=4,
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), cross_attention_dim=32,
            encoder_hid_dim=WIDTH, addition_embed_type="text", addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift", act_fn="gelu",
        ),
        scheduler=diffusers.DDPMScheduler(variance_type="learned_range", thresholding=True),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )  # fmt: skip


def class_conditional_dit() -> Any:
    return diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero", norm_elementwise_affine=False,
        ),
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(),
    )  # fmt: skip


def extra(name: str) -> Any:
    """One of the planner's pipelines."""
    return make_extra(name)[0]


def ddpm() -> Any:
    return diffusers.DDPMPipeline(unet=pixel_unet(), scheduler=diffusers.DDPMScheduler())


def consistency() -> Any:
    unet = pixel_unet(num_class_embeds=10, resnet_time_scale_shift="scale_shift")
    return diffusers.ConsistencyModelPipeline(unet=unet, scheduler=diffusers.CMStochasticIterativeScheduler())


def xl_control_net() -> Any:
    net = xl_net(diffusers.ControlNetModel, 2 * WIDTH, WIDTH, conditioning_embedding_out_channels=(8, 8))
    return diffusers.StableDiffusionXLControlNetPipeline(**xl_parts(), controlnet=net, add_watermarker=False)


def xl_image_to_image() -> Any:
    return diffusers.StableDiffusionXLImg2ImgPipeline(**xl_parts(), add_watermarker=False)


def xl_adapter() -> Any:
    adapter = diffusers.T2IAdapter(
        channels=(16, 32, 32, 32), num_res_blocks=1, adapter_type="full_adapter_xl", downscale_factor=4
    )
    return diffusers.StableDiffusionXLAdapterPipeline(**xl_parts(), adapter=adapter)


# --- videos and sound --------------------------------------------------------------------------------------


def stable_video() -> Any:
    return diffusers.StableVideoDiffusionPipeline(
        image_encoder=clip_vision(224, 56),  # its pictures are always of that size
        feature_extractor=clip_images(224),
        unet=diffusers.UNetSpatioTemporalConditionModel(
            sample_size=8, block_out_channels=(32, 32), layers_per_block=1, num_attention_heads=(2, 2),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=WIDTH,
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
        ),
        vae=diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0,
            timestep_type="continuous", timestep_spacing="leading",
        ),
    )  # fmt: skip


def animate_diff() -> Any:
    channels = (16, 32)
    return diffusers.AnimateDiffPipeline(
        **clip(),
        unet=diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=channels, layers_per_block=1, cross_attention_dim=WIDTH,
            norm_num_groups=8, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        motion_adapter=diffusers.MotionAdapter(
            block_out_channels=channels, motion_layers_per_block=1, motion_norm_num_groups=8,
            motion_num_attention_heads=2,
        ),
        vae=vae((8, 16)),
        scheduler=diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )  # fmt: skip


def hunyuan_video() -> Any:
    return diffusers.HunyuanVideoPipeline(
        **language_model(transformers.LlamaModel),
        **numbered(clip(), 2),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_single_layers=2, num_refiner_layers=1, guidance_embeds=True, text_embed_dim=WIDTH,
            pooled_projection_dim=WIDTH, rope_axes_dim=(4, 6, 6),
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        scheduler=flow(shift=7.0),
    )  # fmt: skip


def ltx() -> Any:
    return diffusers.LTXPipeline(
        **t5(),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            num_layers=2, caption_channels=WIDTH,
        ),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        ),
        scheduler=flow(use_dynamic_shifting=True),
    )  # fmt: skip


def mochi() -> Any:
    return diffusers.MochiPipeline(
        **t5(),
        transformer=diffusers.MochiTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=3, pooled_projection_dim=16, in_channels=12,
            text_embed_dim=WIDTH, time_embed_dim=8, max_sequence_length=256,
        ),
        vae=diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
        ),
        scheduler=flow(invert_sigmas=True),
    )  # fmt: skip


def wan_parts(**config: Any) -> dict[str, Any]:
    """What Wan makes videos of, from texts or pictures."""
    channels = {"in_channels": 16, "out_channels": 16} | config
    return {
        **umt5(),
        "transformer": diffusers.WanTransformer3DModel(
            **channels, num_attention_heads=2, attention_head_dim=12, text_dim=WIDTH, freq_dim=32, ffn_dim=32,
            num_layers=2, rope_max_seq_len=32,
        ),
        "vae": diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }  # fmt: skip


def wan_image_to_video() -> Any:
    return diffusers.WanImageToVideoPipeline(
        **wan_parts(in_channels=36, image_dim=WIDTH), image_encoder=clip_vision(), image_processor=clip_images()
    )


def allegro() -> Any:
    pipe = diffusers.AllegroPipeline(
        **t5(),
        transformer=diffusers.AllegroTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
            cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=2, caption_channels=WIDTH,
        ),
        vae=diffusers.AutoencoderKLAllegro(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(),
    )  # fmt: skip
    pipe.vae.enable_tiling()  # it cannot decode without
    return pipe


def latte() -> Any:
    return diffusers.LattePipeline(
        **t5(),
        transformer=caption_transformer(diffusers.LatteTransformer3DModel, sample_size=8, video_length=4),
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(),
    )


def stable_audio() -> Any:
    return diffusers.StableAudioPipeline(
        **t5(),
        projection_model=diffusers.StableAudioProjectionModel(
            text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32
        ),
        transformer=diffusers.StableAudioDiTModel(
            sample_size=32, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            num_key_value_attention_heads=1, cross_attention_dim=WIDTH, cross_attention_input_dim=WIDTH,
            time_proj_dim=8, global_states_input_dim=2 * WIDTH,
        ),
        vae=diffusers.AutoencoderOobleck(
            encoder_hidden_size=8, downsampling_ratios=[2, 4], channel_multiples=[1, 2], decoder_channels=8,
            decoder_input_channels=4, sampling_rate=64,
        ),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(),
    )  # fmt: skip


# --- all of them -------------------------------------------------------------------------------------------

PICTURE = Workload(height=64, width=64)
VIDEO = Workload(height=64, width=64, num_frames=9)

FAMILIES: dict[str, Family] = {
    "flux-fill": Family(flux_fill, PICTURE),
    "flux2": Family(flux_2, PICTURE),
    "qwen-image": Family(qwen_image, PICTURE),
    "z-image": Family(z_image, PICTURE),
    "chroma": Family(chroma, PICTURE),
    "hidream": Family(hidream, PICTURE, real=False),  # makes as many pixels as 1024 x 1024 of any size
    "pixart-sigma": Family(pixart_sigma, PICTURE),
    "sana": Family(sana, PICTURE),
    "lumina2": Family(lumina_2, PICTURE),
    "aura-flow": Family(aura_flow, PICTURE),
    "kolors": Family(kolors, PICTURE),
    "hunyuan-dit": Family(hunyuan_dit, PICTURE, real=False),  # likewise
    "cogview4": Family(cogview_4, PICTURE),
    "stable-cascade": Family(stable_cascade, Workload(height=128, width=128)),
    "kandinsky-2.2": Family(kandinsky_2_2, PICTURE),
    "deep-floyd": Family(deep_floyd, Workload(height=16, width=16)),
    "dit": Family(class_conditional_dit, PICTURE),
    "ddpm": Family(ddpm, Workload(height=16, width=16)),
    "consistency": Family(consistency, Workload(height=16, width=16)),
    "sdxl-controlnet": Family(xl_control_net, PICTURE),
    "sdxl-adapter": Family(xl_adapter, PICTURE),
    "sdxl-image-to-image": Family(xl_image_to_image, PICTURE),
    "sd3": Family(partial(extra, "sd3"), PICTURE),
    "stable-video": Family(stable_video, Workload(height=64, width=64, num_frames=4)),
    "animate-diff": Family(animate_diff, Workload(height=64, width=64, num_frames=4)),
    "hunyuan-video": Family(hunyuan_video, VIDEO),
    "ltx": Family(ltx, VIDEO),
    "mochi": Family(mochi, Workload(height=64, width=64, num_frames=7)),
    "wan": Family(lambda: diffusers.WanPipeline(**wan_parts()), VIDEO),
    "wan-image-to-video": Family(wan_image_to_video, VIDEO, needs="ftfy"),
    "allegro": Family(allegro, Workload(height=64, width=64, num_frames=8)),
    "latte": Family(latte, Workload(height=64, width=64, num_frames=4)),
    "video-to-video": Family(partial(extra, "video-to-video"), VIDEO),
    "stable-audio": Family(stable_audio, PICTURE),
}


@cache
def make_family(name: str) -> Any:
    """The pipeline, in evaluation mode. Made once: to be read only."""
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.manual_seed(0)
        pipe = FAMILIES[name].make()
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
                for parameter in part.parameters():  # some are left as torch.empty made them
                    parameter.data.nan_to_num_(0.0, 0.0, 0.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe
