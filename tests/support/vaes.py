"""One small VAE of each diffusers class with tiling: the class's own tiles and scales, but few channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_LTX_BLOCKS = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
}
_HUNYUAN_BLOCKS = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (32, 32, 32, 32, 32),
    "layers_per_block": 1,
}
_MAGVIT_BLOCKS = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
_IMAGE_BLOCKS = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "mid_block_add_attention": False,
}

# class name: configuration, latent channels, pixels per latent, latent frames (None for pictures).
VAES: dict[str, tuple[dict[str, Any], int, int, int | None]] = {
    "AutoencoderKL": (_IMAGE_BLOCKS | {"sample_size": 256}, 4, 8, None),
    "AutoencoderKLFlux2": (
        {k: v for k, v in _IMAGE_BLOCKS.items() if k != "sample_size"} | {"sample_size": 256},
        4,
        8,
        None,
    ),
    "AutoencoderTiny": (
        {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)},
        4,
        8,
        None,
    ),
    "AutoencoderDC": (
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (8,) * 6,
            "decoder_block_out_channels": (8,) * 6,
            "encoder_layers_per_block": (1,) * 6,
            "decoder_layers_per_block": (1,) * 6,
            "encoder_qkv_multiscales": ((),) * 6,
            "decoder_qkv_multiscales": ((),) * 6,
            "attention_head_dim": 4,
        },
        4,
        32,
        None,
    ),
    "AutoencoderKLHunyuanImage": (
        _HUNYUAN_BLOCKS
        | {"block_out_channels": (32, 32, 32, 32, 32, 32), "spatial_compression_ratio": 32}
        | {"sample_size": 384},
        4,
        32,
        None,
    ),
    "AutoencoderKLKVAE": (
        {
            "channels": 32,
            "num_enc_blocks": 1,
            "num_dec_blocks": 1,
            "z_channels": 4,
            "ch_mult": (1, 1, 1, 1),
            "sample_size": 256,
        },
        4,
        8,
        None,
    ),
    "AutoencoderKLWan": ({"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}, 4, 8, 1),
    "AutoencoderKLQwenImage": ({"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}, 4, 8, 1),
    "AutoencoderKLQwenImage21": (
        {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1},
        4,
        16,
        1,
    ),
    "AutoencoderKLHunyuanVideo": (
        {"latent_channels": 4, "mid_block_add_attention": False, **_MAGVIT_BLOCKS},
        4,
        8,
        2,
    ),
    "AutoencoderKLHunyuanVideo15": (_HUNYUAN_BLOCKS, 4, 16, 1),
    "AutoencoderKLHunyuanImageRefiner": (_HUNYUAN_BLOCKS, 4, 16, 1),
    "AutoencoderKLLTXVideo": (_LTX_BLOCKS, 4, 32, 2),
    "AutoencoderKLLTX2Video": (
        _LTX_BLOCKS
        | {"decoder_block_out_channels": (8, 16, 32), "decoder_layers_per_block": (1, 1, 1, 1)}
        | {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8},  # as published; the class derives 64
        4,
        32,
        2,
    ),
    "AutoencoderKLMochi": (
        {
            "encoder_block_out_channels": (32, 32, 32, 32),
            "decoder_block_out_channels": (32, 32, 32, 32),
            "latent_channels": 4,
            "layers_per_block": (1, 1, 1, 1, 1),
            "add_attention_block": (False,) * 5,
        },
        4,
        8,
        2,
    ),
    "AutoencoderKLMagvit": ({"latent_channels": 4, **_MAGVIT_BLOCKS}, 4, 8, 1),
    "AutoencoderKLCosmos": (
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (8, 8, 8, 8),
            "decode_block_out_channels": (8, 8, 8, 8),
            "num_layers": 1,
            "latents_mean": None,
            "latents_std": None,
        },
        4,
        8,
        1,
    ),
    "AutoencoderKLCogVideoX": (
        {
            "block_out_channels": (8, 8, 8, 8),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
        },
        4,
        8,
        2,
    ),
    "AutoencoderVidTok": ({"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}, 4, 8, 2),
    "AutoencoderKLMiniMaxH3": (
        {
            "latent_channels": 4,
            "block_out_channels": (32,) * 6,
            "layers_per_block": 1,
            "decoder_num_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_attention_head_dim": 16,
            "latents_mean": (0.0,) * 4,
            "latents_std": (1.0,) * 4,
        },
        4,
        16,
        5,
    ),
}


def small_vae(name: str, *, device: str = "cpu") -> torch.nn.Module:
    """A real VAE of that class with random weights, in evaluation mode."""
    import diffusers
    import torch

    cls = getattr(diffusers, name)  # imported first: a module's own constants must not land on the meta device
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return cls(**VAES[name][0]).eval()
