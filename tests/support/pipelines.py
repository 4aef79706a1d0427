"""Real small pipelines beyond the bundled kinds, made of the same components: encode first, control, three encoders."""

from __future__ import annotations

from typing import Any

import diffusers
import make_pipeline
import torch
from make_pipeline import build, clip_tokenizer, small_autoencoder, small_clip_encoder, small_t5_encoder, t5_tokenizer


class TypoPipeline(diffusers.StableDiffusionImg2ImgPipeline):
    """KolorsImg2ImgPipeline's mistake: a missing `>` makes one name of two, which is no component."""

    model_cpu_offload_seq = "text_encoder->image_encoder-unet->vae"


def stable_diffusion_3(**sizes: Any) -> diffusers.StableDiffusion3Pipeline:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=128, caption_projection_dim=64, pooled_projection_dim=128, pos_embed_max_size=16,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        tokenizer=clip,
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5,
        text_encoder=small_clip_encoder(clip, projection=True),
        text_encoder_2=small_clip_encoder(clip, projection=True),
        text_encoder_3=wide_t5_encoder(t5),
        transformer=transformer,
        vae=small_autoencoder(latent_channels=4, scaling_factor=1.5, shift_factor=0.1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def wide_t5_encoder(tokenizer: Any) -> Any:
    """As wide as the two CLIP encoders side by side."""
    config = small_t5_encoder(tokenizer).config
    config.d_model = 128
    return type(small_t5_encoder(tokenizer))(config)


def control_net() -> diffusers.StableDiffusionControlNetPipeline:
    parts = _parts("sd15-small")
    net = diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_channels=3)
    return diffusers.StableDiffusionControlNetPipeline(controlnet=net, requires_safety_checker=False, **parts)


def _parts(kind: str) -> dict[str, Any]:
    return dict(build(kind).components)


def _of(cls: type, kind: str, **options: Any) -> Any:
    return cls(**(_parts(kind) | options))


PICTURE = torch.zeros((1, 3, 64, 64))
VIDEO = torch.zeros((1, 9, 3, 64, 64))
TEXT = {"prompt": "a fox", "num_inference_steps": 2, "output_type": "latent"}
SIZE = {"height": 64, "width": 64}

# name: how to make it, how to call it (decoding included unless told otherwise).
EXTRA: dict[str, Any] = {
    "img2img": (
        lambda: _of(diffusers.StableDiffusionImg2ImgPipeline, "sd15-small", requires_safety_checker=False),
        {"image": PICTURE, "strength": 1.0},
    ),
    "inpaint": (
        lambda: _of(diffusers.StableDiffusionInpaintPipeline, "sd15-small", requires_safety_checker=False),
        {"image": PICTURE, "mask_image": torch.ones((1, 1, 64, 64)), "strength": 1.0, **SIZE},
    ),
    "typo": (
        lambda: _of(TypoPipeline, "sd15-small", requires_safety_checker=False),
        {"image": PICTURE, "strength": 1.0},
    ),
    "controlnet": (control_net, {"image": PICTURE, **SIZE}),
    "sdxl-img2img": (
        lambda: _of(diffusers.StableDiffusionXLImg2ImgPipeline, "sdxl-small", add_watermarker=False),
        {"image": PICTURE, "strength": 1.0},
    ),
    "flux-img2img": (
        lambda: _of(diffusers.FluxImg2ImgPipeline, "flux-small"),
        {"image": PICTURE, "strength": 1.0, "max_sequence_length": 32, **SIZE},
    ),
    "video-to-video": (
        lambda: _of(diffusers.CogVideoXVideoToVideoPipeline, "cogvideox-small"),
        {"video": VIDEO[0], "strength": 1.0, "max_sequence_length": 32, **SIZE},
    ),
    "sd3": (stable_diffusion_3, {"max_sequence_length": 32, **SIZE}),
}


def make_extra(name: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline, in evaluation mode, and the arguments of a short call that also decodes."""
    make, call = EXTRA[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = make()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**TEXT, "output_type": "pt", **call}


__all__ = ["EXTRA", "make_extra", "make_pipeline"]
