"""Make a real diffusers pipeline with random weights: nothing to download, and it runs.

    python examples/make_pipeline.py sd15-small /tmp/sd15-small

`sd15` has the size of Stable Diffusion 1.5, to the parameter: what it draws is noise, but the memory and
the time it takes are those of the model. The small ones are a few megabytes of the same classes as the real
pipelines, for tests on any machine.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

# diffusers and transformers import a class when it is first named: a wrong option is answered at once.
import diffusers
import torch
import transformers
from tokenizers import pre_tokenizers, trainers

from vramplan.errors import UsageError, VramplanError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# What the tokenizers learn from. The words of prompts, so that a prompt is a few tokens and not letters.
TEXT = """
a photo of a red fox in the snow, golden hour, sharp focus, highly detailed
a photo of an astronaut riding a horse on mars, cinematic light, wide angle
an oil painting of the sea at night, dark blue waves, the moon above the water
a watercolor painting of a small house in the forest, autumn leaves, soft light
a portrait of an old man with a white beard, black and white, studio light
a portrait of a young woman with red hair, flowers in her hair, soft focus
a cat sitting on a chair by the window, morning light, high resolution, 4k
a dog running on the beach, blue sky, white clouds, water splashing, 8k
a city street at night in the rain, neon lights, reflections on the ground
a bowl of fruit on a wooden table, still life, dramatic light, oil painting
a mountain lake in the morning, mist over the water, green trees, blue sky
a robot holding a red balloon, concept art, trending, highly detailed
a panda playing a guitar in a bamboo forest, sunlight through the leaves
a drone flies over a river between green hills, the camera moves slowly forward
a steaming cup of coffee on a table, the steam rises slowly, warm light
the quick brown fox jumps over the lazy dog
low quality, blurry, bad anatomy, worst quality, jpeg artifacts, watermark, text
""".strip().splitlines()


@dataclass(frozen=True)
class Kind:
    """One kind of pipeline: how to make it, and the dtype it has when none is asked for."""

    make: Callable[[], diffusers.DiffusionPipeline]
    dtype: str = "float32"


# --- tokenizers ------------------------------------------------------------------------------------------


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """A byte-level BPE of `TEXT`, its vocabulary in CLIP's own order: bytes, ends of words, merges, specials.

    The end-of-text token has the highest id, as in CLIP; any text can be encoded, since every byte is there.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [f"{letter}</w>" for letter in letters]
    learner = transformers.CLIPTokenizer().backend_tokenizer  # empty, but with CLIP's own way to split a text
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        end_of_word_suffix="</w>",
        special_tokens=tokens,  # fixes their order, and so which of two equally frequent pairs comes first
        show_progress=False,
    )
    learner.train_from_iterator(TEXT, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]

    tokens += ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def t5_tokenizer() -> transformers.T5Tokenizer:
    """A unigram tokenizer of the words and letters of `TEXT`, weighted by how often they occur.

    Counted here and not by the trainer of the tokenizers library, which orders equal pieces differently from
    one run to the next: the same seed has to give the same pipeline.
    """
    words = Counter(f"▁{word.strip(',')}" for line in TEXT for word in line.split())
    letters = Counter({"▁": 1} | {chr(code): 1 for code in range(ord("!"), ord("~") + 1)})
    counts = letters | words
    total = counts.total()
    pieces = [(piece, math.log(count / total)) for piece, count in sorted(counts.items())]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return transformers.T5Tokenizer(vocab=specials + pieces, model_max_length=512)


# --- components that several kinds share -----------------------------------------------------------------


def clip_encoder(
    tokenizer: transformers.CLIPTokenizer,
    *,
    width: int,
    layers: int,
    heads: int,
    projection: bool = False,
    **config: Any,
) -> transformers.CLIPTextModel | transformers.CLIPTextModelWithProjection:
    """A CLIP text encoder for this tokenizer; `projection` for the kind that pools."""
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": tokenizer.model_max_length,
    }
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,  # where the encoder pools
        "pad_token_id": tokenizer.pad_token_id,
    }
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return cls(transformers.CLIPTextConfig(**(sizes | ids | config)))


def small_clip_encoder(
    tokenizer: transformers.CLIPTokenizer, **config: Any
) -> transformers.CLIPTextModel | transformers.CLIPTextModelWithProjection:
    """A CLIP text encoder of 64 channels."""
    return clip_encoder(tokenizer, width=64, layers=3, heads=4, **config)


def small_t5_encoder(tokenizer: transformers.T5Tokenizer) -> transformers.T5EncoderModel:
    """A T5 v1.1 encoder of 64 channels."""
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config)


def autoencoder(channels: tuple[int, ...], **config: Any) -> diffusers.AutoencoderKL:
    """An image autoencoder with one resolution per entry of `channels`, two layers in each."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=2,
        **config,
    )


def small_autoencoder(**config: Any) -> diffusers.AutoencoderKL:
    """An image autoencoder that reduces by 8, as the real ones; tiling acts above 32 pixels."""
    return autoencoder((16, 32, 32, 32), norm_num_groups=8, sample_size=32, **config)


def stable_diffusion_noise() -> dict[str, Any]:
    """The noise schedule that Stable Diffusion and its successors were trained with."""
    return {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


# --- the kinds -------------------------------------------------------------------------------------------


def stable_diffusion(
    tokenizer: transformers.CLIPTokenizer,
    text_encoder: transformers.CLIPTextModel,
    unet: diffusers.UNet2DConditionModel,
    vae: diffusers.AutoencoderKL,
) -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion 1 of these components."""
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **stable_diffusion_noise())
    return diffusers.StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet,
        vae=vae,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_sd15() -> diffusers.DiffusionPipeline:
    """Stable Diffusion 1.5 in full size."""
    tokenizer = clip_tokenizer()
    # The embedding keeps CLIP's 49408 rows, of which the tokenizer here uses the first.
    text_encoder = clip_encoder(tokenizer, width=768, layers=12, heads=12, vocab_size=49408)
    unet = diffusers.UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=768,
    )
    vae = autoencoder((128, 256, 512, 512), latent_channels=4, norm_num_groups=32, sample_size=512)
    return stable_diffusion(tokenizer, text_encoder, unet, vae)


def make_sd15_small() -> diffusers.DiffusionPipeline:
    """Stable Diffusion 1.5 in small: the same four blocks down and up, with fewer channels."""
    tokenizer = clip_tokenizer()
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    return stable_diffusion(tokenizer, small_clip_encoder(tokenizer), unet, small_autoencoder(latent_channels=4))


def make_sdxl_small() -> diffusers.DiffusionPipeline:
    """Stable Diffusion XL in small: two text encoders, three blocks, the size and crop as conditions."""
    tokenizer = clip_tokenizer()
    text_encoder = small_clip_encoder(tokenizer)
    text_encoder_2 = small_clip_encoder(tokenizer, projection=True, hidden_act="gelu")
    size_channels = 8  # of each of the six numbers of size and crop
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 2, 2),
        use_linear_projection=True,
        cross_attention_dim=2 * 64,  # the two encoders side by side
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=size_channels,
        projection_class_embeddings_input_dim=6 * size_channels + 64,
    )
    return diffusers.StableDiffusionXLPipeline(
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        unet=unet,
        vae=small_autoencoder(latent_channels=4, scaling_factor=0.13025),
        scheduler=diffusers.EulerDiscreteScheduler(
            timestep_spacing="leading", steps_offset=1, **stable_diffusion_noise()
        ),
        add_watermarker=False,  # it would depend on whether one more package is installed
    )


def make_flux_small() -> diffusers.DiffusionPipeline:
    """FLUX.1-dev in small: CLIP and T5, blocks of two streams, then blocks of one."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    latent_channels = 4
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4 * latent_channels,  # the pipeline packs 2 x 2 latents into one token
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    return diffusers.FluxPipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        text_encoder=small_clip_encoder(tokenizer),
        text_encoder_2=small_t5_encoder(tokenizer_2),
        transformer=transformer,
        vae=small_autoencoder(
            latent_channels=latent_channels,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def make_cogvideox_small() -> diffusers.DiffusionPipeline:
    """CogVideoX-5b in small: T5, rotary positions, a video autoencoder that reduces by 8, and time by 4."""
    tokenizer = t5_tokenizer()
    # A tile is half of this: 48 x 40 pixels, 6 x 5 latents. The decoder lays the tiles 5/6 of a tile apart in
    # height and 4/5 in width; any tile whose latents those do not divide gives a video of another size.
    height, width = 96, 80
    latent_channels = 4
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        time_embed_dim=32,
        text_embed_dim=64,
        num_layers=3,
        sample_height=height // 8,
        sample_width=width // 8,
        sample_frames=9,
        use_rotary_positional_embeddings=True,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(16, 16, 16, 32),
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=4,
        sample_height=height,
        sample_width=width,
        scaling_factor=0.7,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        **stable_diffusion_noise(),
    )
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=small_t5_encoder(tokenizer),
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
    )


KINDS = {
    "sd15": Kind(make_sd15, dtype="float16"),
    "sd15-small": Kind(make_sd15_small),
    "sdxl-small": Kind(make_sdxl_small),
    "flux-small": Kind(make_flux_small),
    "cogvideox-small": Kind(make_cogvideox_small),
}
SMALL_KINDS = tuple(kind for kind in KINDS if kind.endswith("-small"))


# --- build and save --------------------------------------------------------------------------------------


def build(kind: str, *, dtype: str | torch.dtype | None = None, seed: int = 0) -> diffusers.DiffusionPipeline:
    """The pipeline in memory, in evaluation mode. The same seed gives the same weights.

    Raises:
        UsageError: no such kind, or no such dtype.
    """
    if kind not in KINDS:
        raise UsageError(f"{kind!r} is not a kind of pipeline: choose one of {', '.join(KINDS)}")
    wanted = _dtype(KINDS[kind].dtype if dtype is None else dtype)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.manual_seed(seed)
        pipeline = KINDS[kind].make()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            # Not the component's own `to`: it warns of modules to keep in float32 even where there are none.
            torch.nn.Module.to(component, wanted).eval()
    return pipeline


def save(kind: str, folder: str | Path, *, dtype: str | torch.dtype | None = None, seed: int = 0) -> Path:
    """Build the pipeline and write it to `folder`, which must be new or empty: all of it, or nothing.

    Raises:
        UsageError: no such kind or dtype, or something is in the folder's place.
    """
    target = Path(folder).absolute()
    if not _is_free(target):
        raise UsageError(f"{folder} exists and is not an empty folder: name a new one")
    pipeline = build(kind, dtype=dtype, seed=seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename on the same disk.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
        finished = Path(beside) / "pipeline"
        pipeline.save_pretrained(finished, safe_serialization=True)
        if target.exists():
            target.rmdir()
        finished.rename(target)
    return target


def _is_free(target: Path) -> bool:
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


def _dtype(wanted: str | torch.dtype) -> torch.dtype:
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted not in DTYPES:
        raise UsageError(f"{wanted!r} is not a dtype: choose one of {', '.join(DTYPES)}")
    return DTYPES[wanted]


# --- command line ----------------------------------------------------------------------------------------


@click.command()
@click.argument("kind", metavar="KIND", type=click.Choice(list(KINDS)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Default: float16 for sd15, else float32.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random weights.")
def command(kind: str, folder: Path, dtype: str | None, seed: int) -> None:
    """Make a pipeline of KIND with random weights and save it in FOLDER.

    KIND is sd15 (2 GB, of the size of Stable Diffusion 1.5), sd15-small, sdxl-small, flux-small or
    cogvideox-small (a few MB each). FOLDER must be new or empty.
    """
    click.echo(save(kind, folder, dtype=dtype, seed=seed))


def _quiet_libraries() -> None:
    """Nothing on stderr but what this script has to say."""
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; what goes wrong is one line on stderr. Returns the exit code."""
    _quiet_libraries()
    try:
        return command.main(arguments, standalone_mode=False) or 0
    except click.ClickException as error:
        message, code = error.format_message(), error.exit_code
    except VramplanError as error:
        message, code = str(error), error.exit_code
    except OSError as error:
        message, code = str(error), 1
    except click.Abort:
        message, code = "interrupted: nothing was written", 130
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
