"""What running a component needs beside its weights: activations and operations, each with its basis.

This is the seam for the simulated accelerator: anything with these two methods can price candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any, Protocol

from vramplan.pipeline.types import Component, PipelineSpec, Use
from vramplan.residuals import Basis
from vramplan.strategies.base import Decode, Picture
from vramplan.units import MIB
from vramplan.workload import Workload

# Activations live at once, in units of tokens x width x element size. FLUX.1-dev at 1024 x 1024 has
# 17.4 (0.46 GiB), HunyuanVideo at 121 x 512 x 768 has 17 (5.0 GiB published); 20 is on the safe side.
_DIT_FACTOR = 20
# The same for UNets, in units of latent pixels x first channel count: safe side, not measured.
_UNET_FACTOR = 48
# Bytes a convolutional VAE keeps per pixel and element size while decoding a picture: 768 in a
# simulation of SDXL's (1.50 GiB at 1024 x 1024 in bfloat16) plus a workspace of about 1 GiB; and 2200
# reserved (InvokeAI, vae_working_memory.py, measured). Encoding takes half of it.
_IMAGE_DECODE_FACTOR = 1600
# Per pixel and frame for video VAEs: CogVideoX has 467 (14.74 GiB for 49 x 480 x 720), HunyuanVideo 242,
# LTX-2 268; and per pixel at least what Wan needs for few frames, 7000 (InvokeAI, measured).
_VIDEO_DECODE_FACTOR = 500
_VIDEO_DECODE_FLOOR = 7000
# Output tiles, the blended picture and the final one are alive together: three copies of three channels.
_OUTPUT_COPIES = 9
_ENCODER_BYTES = 256 * MIB
_ENCODER_TOKENS = 512
# Operations per decoded pixel: SD's decoder needs 2.5 TFLOP for 512 x 512 (FlopCounterMode).
_DECODE_FLOPS_PER_PIXEL = 1e7
# UNets spend most parameters where the picture is small: 6 TFLOP for SDXL at 1024 x 1024 against
# 2 x parameters x latent pixels = 84 TFLOP.
_UNET_FLOPS_SHARE = 0.09
# How much more than is allocated the caching allocator takes from the device: covers CogVideoX-2b's published 33 GB
# reserved against 27 GiB allocated, and InvokeAI's measured VAE decodes. Assumed.
ASSUMED_SLACK = 1.4
# Bytes that normalisations, activations and copies move for each operation of products: 2.1e-3 in a simulation
# of FLUX.1-dev, 1.8e-3 of SDXL, 1.1e-3 of CogVideoX-5b.
_TRAFFIC_PER_FLOP = 2e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes that are allocated, what the caching allocator takes from the device for them, and where it comes from."""

    size_bytes: int
    reserved_bytes: int
    basis: Basis


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one use computes: floating-point operations, bytes that kernels without any read and write, kernels
    launched, and forwards made (one for each tile and slice of a VAE)."""

    flops: float
    traffic_bytes: float
    launches: float
    forwards: float


class Footprint(Protocol):
    """The needs of one workload on one pipeline, before any strategy is chosen.

    `workspace_bytes` is what matrix products hold all along, where activations do not contain it.
    """

    @property
    def workspace_bytes(self) -> int:
        """Bytes, 0 where activations contain them."""

    def activation(self, use: Use, decode: Sequence[Decode]) -> Estimate:
        """The most bytes of activations and workspaces alive while this use runs."""

    def work(self, use: Use, decode: Sequence[Decode]) -> Work:
        """What one such use computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssumedFootprint:
    """Rules of thumb on the safe side, until the pipeline is simulated. Every basis is `assumed`."""

    spec: PipelineSpec
    workload: Workload
    # cuBLAS holds 8 MiB, 32 MiB on Hopper, for each handle and stream (CUBLAS_WORKSPACE_CONFIG, PyTorch "CUDA
    # semantics"), rounded up for several of them. Assumed.
    workspace_bytes: int = 64 * MIB

    def activation(self, use: Use, decode: Sequence[Decode]) -> Estimate:
        """Activations by role: tokens for a transformer, latent pixels for a UNet, pixels for a VAE."""
        component = self.spec.component(use.component)
        if component.role in ("denoiser", "control"):
            size = self._denoiser_bytes(component)
        elif component.role == "vae":
            size = self._vae_bytes(component, use, decode)
        else:
            size = _ENCODER_BYTES
        return Estimate(size_bytes=size, reserved_bytes=int(size * ASSUMED_SLACK), basis="assumed")

    def work(self, use: Use, decode: Sequence[Decode]) -> Work:
        """Two operations per parameter and token, and attention's; per pixel for a VAE."""
        component = self.spec.component(use.component)
        flops, forwards = 2.0 * component.parameter_count * _ENCODER_TOKENS, 1
        if component.role in ("denoiser", "control"):
            flops = self._denoiser_flops(component)
        elif component.role == "vae":
            flops = _DECODE_FLOPS_PER_PIXEL * self._whole(component).pixels
            forwards = self._tiles(component, decode)
        return Work(flops=flops, traffic_bytes=flops * _TRAFFIC_PER_FLOP, launches=0, forwards=forwards)

    def _tiles(self, component: Component, decode: Sequence[Decode]) -> int:
        """Tiles and slices, by their number of pixels."""
        whole = self._whole(component)
        return -(-whole.pixels // max(1, _shrunk(whole, component, decode).pixels))

    def _denoiser_bytes(self, component: Component) -> int:
        shape = denoiser_shape(component, self.spec, self.workload)
        factor = _UNET_FACTOR if shape.convolutional else _DIT_FACTOR
        return factor * shape.tokens * shape.width * component.element_bytes * shape.batch

    def _denoiser_flops(self, component: Component) -> float:
        shape = denoiser_shape(component, self.spec, self.workload)
        dense = 2.0 * component.parameter_count * shape.tokens * shape.batch
        if shape.convolutional:
            return dense * _UNET_FLOPS_SHARE
        layers = max(1, len(component.geometry.blocks))
        return dense + 4.0 * shape.tokens**2 * shape.width * layers * shape.batch

    def _vae_bytes(self, component: Component, use: Use, decode: Sequence[Decode]) -> int:
        whole = self._whole(component)
        picture = _shrunk(whole, component, decode)
        area = picture.height * picture.width * picture.batch
        if self.spec.video:
            factor = max(_VIDEO_DECODE_FLOOR, _VIDEO_DECODE_FACTOR * picture.frames)
        else:
            factor = _IMAGE_DECODE_FACTOR * picture.frames
        working = factor * area // (2 if use.phase == "encode" else 1)
        return (working + _OUTPUT_COPIES * picture.whole_pixels) * component.element_bytes

    def _whole(self, vae: Component) -> Picture:
        work = self.workload
        frames = work.num_frames if self.spec.video else 1
        height, width = work.sides
        pixels = height * width * frames * work.num_images_per_prompt
        return Picture(
            height=height,
            width=width,
            frames=frames,
            batch=work.num_images_per_prompt,
            whole_pixels=pixels,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserShape:
    """What a denoiser works on in one forward: tokens (or latent pixels), their width, and the batch."""

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
    """Pixels per latent along a side, and frames per latent frame; (8, 1) where nothing says otherwise."""
    config: Mapping[str, Any] = vae.config if vae else {}
    stages = len(config.get("block_out_channels") or config.get("encoder_block_out_channels") or (1,) * 4)
    spatial = config.get("spatial_compression_ratio") or config.get("scale_factor_spatial") or 2 ** max(0, stages - 1)
    temporal = config.get("temporal_compression_ratio") or config.get("scale_factor_temporal")
    halvings = config.get("spatio_temporal_scaling")
    if isinstance(halvings, list | tuple):  # LTX-Video's, beside its patches (diffusers 0.42, AutoencoderKLLTXVideo)
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
    """Latent pixels and latent frames per token of a denoiser: the patch, or the two by two pixels that pipelines pack
    before the model sees it; (1, 1) for a UNet."""
    if "block_out_channels" in config:
        return 1, 1
    size = config.get("patch_size", 1)
    area = prod(size[-2:]) if isinstance(size, list | tuple) else int(size or 1) ** 2
    frames = size[0] if isinstance(size, list | tuple) and len(size) == 3 else config.get("patch_size_t") or 1
    latent = (vae.config.get("latent_channels") or vae.config.get("z_dim")) if vae else None
    packed = area == 1 and isinstance(latent, int) and config.get("in_channels") == 4 * latent
    return (4, 1) if packed else (int(area), int(frames))


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


def _shrunk(whole: Picture, vae: Component, decode: Sequence[Decode]) -> Picture:
    return reduce(lambda picture, setting: setting.shrink(picture, vae), decode, whole)
