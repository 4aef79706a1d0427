"""The needs of a component in addition to its weights: activations and operations, each with its basis.

The simulator implements `Footprint` too: any class with these methods can price candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

from vramplan.pipeline.latents import _ENCODER_TOKENS, denoiser_shape
from vramplan.pipeline.types import Component, PipelineSpec, Use
from vramplan.planner.residuals import Basis
from vramplan.strategies.base import Decode, Picture
from vramplan.units import MIB
from vramplan.workload import Workload

# Peak of activations, in units of tokens x width x element size. FLUX.1-dev at 1024 x 1024 has 17.4 (0.46 GiB),
# HunyuanVideo at 121 x 512 x 768 has 17 (5.0 GiB published); 20 is on the safe side.
_DIT_FACTOR = 20
# The same for UNets, in units of latent pixels x first channel count: on the safe side, not measured.
_UNET_FACTOR = 48
# Bytes that a convolutional VAE keeps per pixel and element size while decoding a picture: 768 in a simulation of SDXL
# (1.50 GiB at 1024 x 1024 in bfloat16) plus a workspace of about 1 GiB; 2200 reserved (InvokeAI, vae_working_memory.py,
# measured). Encoding takes half.
_IMAGE_DECODE_FACTOR = 1600
# The same per pixel and frame for video VAEs: CogVideoX has 467 (14.74 GiB for 49 x 480 x 720), HunyuanVideo 242, LTX-2
# 268; the floor per pixel is the need of Wan for few frames, 7000 (InvokeAI, measured).
_VIDEO_DECODE_FACTOR = 500
_VIDEO_DECODE_FLOOR = 7000
# Output tiles, the blended picture and the final one exist together: three copies of three channels.
_OUTPUT_COPIES = 9
_ENCODER_BYTES = 256 * MIB
# Operations per decoded pixel: SD's decoder needs 2.5 TFLOP for 512 x 512 (FlopCounterMode).
_DECODE_FLOPS_PER_PIXEL = 1e7
# UNets have most parameters at low resolution: 6 TFLOP for SDXL at 1024 x 1024 against 2 x parameters x latent pixels =
# 84 TFLOP.
_UNET_FLOPS_SHARE = 0.09
# Reserved memory of the caching allocator per allocated byte: covers CogVideoX-2b's published 33 GB reserved against
# 27 GiB allocated, and InvokeAI's measured VAE decodes. Assumed.
ASSUMED_SLACK = 1.4
# Bytes that normalisations, activations and copies move per operation of matrix products: 2.1e-3 in a simulation of
# FLUX.1-dev, 1.8e-3 of SDXL, 1.1e-3 of CogVideoX-5b.
_TRAFFIC_PER_FLOP = 2e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Allocated bytes, the bytes that the caching allocator reserves for them, and the basis of both."""

    size_bytes: int
    reserved_bytes: int
    basis: Basis


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of one use: floating-point operations by kind and dtype, bytes read and written by the kernels that have
    none, kernel launches, and forwards (one for each tile and slice of a VAE)."""

    flops: Mapping[str, float]
    traffic_bytes: float
    launches: float
    forwards: float


class Footprint(Protocol):
    """The needs of one workload on one pipeline, before any strategy is chosen."""

    @property
    def workspace_bytes(self) -> int:
        """Bytes that matrix products hold throughout; 0 if activations contain them."""

    def makes(self, use: Use) -> bool:
        """Whether the call makes this use, as far as is known."""

    @property
    def evaluations(self) -> int:
        """The number of evaluations of the denoiser in a call."""

    def activation(self, use: Use, decode: Sequence[Decode]) -> Estimate:
        """Return the peak of activations and workspaces while this use runs."""

    def work(self, use: Use, decode: Sequence[Decode]) -> Work:
        """Return the work of one such use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssumedFootprint:
    """Rules of thumb on the safe side, for a pipeline that is not simulated. Every basis is `assumed`."""

    spec: PipelineSpec
    workload: Workload
    # cuBLAS holds 8 MiB, 32 MiB on Hopper, per handle and stream (CUBLAS_WORKSPACE_CONFIG, PyTorch "CUDA semantics"),
    # rounded up for several of them. Assumed.
    workspace_bytes: int = 64 * MIB

    def makes(self, use: Use) -> bool:
        """Every use: without a simulated call none can be ruled out."""
        return True

    @property
    def evaluations(self) -> int:
        """One evaluation a step."""
        return self.workload.num_inference_steps

    def activation(self, use: Use, decode: Sequence[Decode]) -> Estimate:
        """Estimate activations by role: tokens for a transformer, latent pixels for a UNet, pixels for a VAE."""
        component = self.spec.component(use.component)
        if component.role in ("denoiser", "control"):
            size = self._denoiser_bytes(component)
        elif component.role == "vae":
            size = self._vae_bytes(component, use, decode)
        else:
            size = _ENCODER_BYTES
        return Estimate(size_bytes=size, reserved_bytes=int(size * ASSUMED_SLACK), basis="assumed")

    def work(self, use: Use, decode: Sequence[Decode]) -> Work:
        """Estimate two operations per parameter and token, plus those of attention; a VAE's per pixel."""
        component = self.spec.component(use.component)
        flops, forwards = 2.0 * component.parameter_count * _ENCODER_TOKENS, 1
        if component.role in ("denoiser", "control"):
            flops = self._denoiser_flops(component)
        elif component.role == "vae":
            flops = _DECODE_FLOPS_PER_PIXEL * self._whole_picture().pixels
            forwards = self._tiles(component, decode)
        kinds = {f"product {component.dtype}": flops}
        return Work(flops=kinds, traffic_bytes=flops * _TRAFFIC_PER_FLOP, launches=0, forwards=forwards)

    def _tiles(self, component: Component, decode: Sequence[Decode]) -> int:
        """Count tiles and slices, by their number of pixels."""
        whole = self._whole_picture()
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
        whole = self._whole_picture()
        picture = _shrunk(whole, component, decode)
        area = picture.height * picture.width * picture.batch
        if self.spec.video:
            factor = max(_VIDEO_DECODE_FLOOR, _VIDEO_DECODE_FACTOR * picture.frames)
        else:
            factor = _IMAGE_DECODE_FACTOR * picture.frames
        working = factor * area // (2 if use.phase == "encode" else 1)
        return (working + _OUTPUT_COPIES * picture.whole_pixels) * component.element_bytes

    def _whole_picture(self) -> Picture:
        work = self.workload
        frames = work.num_frames if self.spec.video else 1
        height, width = work.sides
        batch = work.num_images_per_prompt
        pixels = height * width * frames * batch
        return Picture(height=height, width=width, frames=frames, batch=batch, whole_pixels=pixels)


def _shrunk(whole: Picture, vae: Component, decode: Sequence[Decode]) -> Picture:
    return reduce(lambda picture, setting: setting.shrink(picture, vae), decode, whole)
