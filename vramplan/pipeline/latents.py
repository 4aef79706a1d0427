"""Compute the shapes of latents and prompts from a component's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, lcm, prod
from typing import Any

from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.workload import Workload

_ENCODER_TOKENS = 512
_TRANSFORMER_STEP = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserShape:
    """The input of a denoiser in one forward: tokens (or latent pixels), their width, and the batch."""

    tokens: int
    width: int
    batch: int
    convolutional: bool


def denoiser_shape(component: Component, spec: PipelineSpec, workload: Workload) -> DenoiserShape:
    """The sequence length and width of a forward, from the configurations of denoiser and VAE."""
    config = component.config
    vae = next(iter(spec.vaes), None)
    spatial, temporal = vae_scale(vae)
    frames = 1 + (workload.num_frames - 1) // temporal if spec.video else 1
    height, width = workload.latent_sides(spatial)
    pixels = height * width * frames
    convolutional = "block_out_channels" in config
    patch = prod(patch_of(config, vae))
    tokens = pixels // patch + (0 if convolutional else _ENCODER_TOKENS)
    # A distilled guidance embedding replaces the second, unconditional forward.
    doubled = (workload.guidance_scale or 2.0) > 1 and "guidance_embeds" not in config
    return DenoiserShape(
        tokens=max(1, tokens),
        width=_width(config),
        batch=workload.num_images_per_prompt * (2 if doubled else 1),
        convolutional=convolutional,
    )


def vae_scale(vae: Component | None) -> tuple[int, int]:
    """The pixels per latent along a side, and frames per latent frame; (8, 1) without a configuration."""
    config: Mapping[str, Any] = vae.config if vae else {}
    stages = len(config.get("block_out_channels") or config.get("encoder_block_out_channels") or (1,) * 4)
    spatial = config.get("spatial_compression_ratio") or config.get("scale_factor_spatial") or 2 ** max(0, stages - 1)
    temporal = config.get("temporal_compression_ratio") or config.get("scale_factor_temporal")
    halvings = config.get("spatio_temporal_scaling")
    if isinstance(halvings, list | tuple):  # LTX-Video's, on top of patches (diffusers 0.42, AutoencoderKLLTXVideo)
        halved = 2 ** sum(map(bool, halvings))
        spatial = config.get("spatial_compression_ratio") or int(config.get("patch_size", 1)) * halved
        temporal = temporal or int(config.get("patch_size_t", 1)) * halved
    expansions = config.get("temporal_expansions")
    if temporal is None and isinstance(expansions, list | tuple):
        temporal = prod(expansions)
    if temporal is None and vae is not None and "Wan" in vae.class_name:
        temporal = 4
    return int(spatial), int(temporal or 1)


def patch_of(config: Mapping[str, Any], vae: Component | None) -> tuple[int, int]:
    """The latent pixels and latent frames per token of a denoiser: its patch, or the two by two pixels that pipelines
    pack before the model; (1, 1) for a UNet."""
    if "block_out_channels" in config:
        return 1, 1
    size = config.get("patch_size", 1)
    area = prod(size[-2:]) if isinstance(size, list | tuple) else int(size or 1) ** 2
    frames = size[0] if isinstance(size, list | tuple) and len(size) == 3 else config.get("patch_size_t") or 1
    latent = (vae.config.get("latent_channels") or vae.config.get("z_dim")) if vae else None
    packed = area == 1 and isinstance(latent, int) and config.get("in_channels") == 4 * latent
    return (4, 1) if packed else (int(area), int(frames))


def size_step(spec: PipelineSpec) -> int:
    """The pixels that sides are multiples of: a patch of the first denoiser's; of a transformer's 16 at least, as all
    pair latents and some do not say so in their configuration (Z-Image, FLUX.1-Fill; diffusers 0.42)."""
    vae = next(iter(spec.vaes), None)
    config = next((component.config for component in spec.components if component.role == "denoiser"), {})
    area, _ = patch_of(config, vae)
    step = vae_scale(vae)[0] * isqrt(area)
    return step if "block_out_channels" in config else lcm(step, _TRANSFORMER_STEP)


def smaller_size(spec: PipelineSpec, workload: Workload, scale: float) -> tuple[int, int] | None:
    """Height and width times `scale`, down to what the pipeline takes as it is; None where nothing is left."""
    step = size_step(spec)
    height, width = (int(side * scale) // step * step for side in (workload.height, workload.width))
    return (height, width) if height and width else None


def _width(config: Mapping[str, Any]) -> int:
    channels = config.get("block_out_channels")
    if channels:
        return int(channels[0])
    heads, head = config.get("num_attention_heads"), config.get("attention_head_dim")
    if isinstance(heads, int) and isinstance(head, int):
        return heads * head
    for key in ("hidden_size", "inner_dim", "dim", "hidden_dim", "cross_attention_dim"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return 3072
