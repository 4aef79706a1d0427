"""Parts of components that pipelines use beside calling the component."""

from __future__ import annotations

import diffusers
import pytest

from vramplan.pipeline.build import build_weightless
from vramplan.pipeline.component import describe_component

CLIP = ("transformers", "CLIPTextModel", {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2})
SMALL = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN = ("transformers", "Qwen3Model", SMALL | {"num_key_value_heads": 2, "head_dim": 8})


class Skips(diffusers.StableDiffusionPipeline):
    """Runs the last norm by itself."""

    def encode(self, states):
        return self.text_encoder.final_layer_norm(states)


class Hands(diffusers.StableDiffusionPipeline):
    """Hands a layer to a function that calls it, after counting others."""

    def encode(self, states):
        assert len(self.text_encoder.encoder.layers) > 1
        return self.run(states, layer=self.text_encoder.final_layer_norm)


class Reads(diffusers.StableDiffusionPipeline):
    """Reads a weight, calls what has none, and a layer only when it is made."""

    def __init__(self, *parts, **options):
        super().__init__(*parts, **options)
        self.text_encoder.final_layer_norm(None)

    def encode(self, text_encoder, states):
        text_encoder.encoder.layers.to(states.device)
        return states * text_encoder.final_layer_norm.weight


BARE: dict = {}
exec("class Bare:\n    def encode(self, x):\n        return self.text_encoder.final_layer_norm(x)", BARE)


def refusals(pipeline, name, what):
    component = describe_component(name, build_weightless(*what), pipeline=pipeline)
    return component.block_offload_refusal, component.disk_offload_refusal


@pytest.mark.parametrize(
    ("pipeline", "name", "what", "block", "disk"),
    [
        (Skips, "text_encoder", CLIP, "Skips calls final_layer_norm of text_encoder directly", None),
        (Skips, "text_encoder_2", CLIP, None, None),
        (Hands, "text_encoder", CLIP, "Hands calls final_layer_norm of text_encoder directly", None),
        (Reads, "text_encoder", CLIP, None, "Reads reads final_layer_norm.weight of text_encoder directly"),
        (BARE["Bare"], "text_encoder", CLIP, None, None),  # its source is nowhere
        (None, "text_encoder", CLIP, None, None),
        (diffusers.StableDiffusionXLPipeline, "text_encoder", CLIP, None, None),
        (diffusers.AceStepPipeline, "text_encoder", QWEN, "AceStepPipeline calls get_input_embeddings of", None),
        (
            diffusers.AudioLDM2Pipeline,
            "text_encoder",
            ("transformers", "ClapModel", {"text_config": SMALL, "projection_dim": 16}),
            "AudioLDM2Pipeline calls get_text_features of text_encoder directly",
            None,
        ),
        (
            diffusers.Flux2Pipeline,
            "vae",
            ("diffusers", "AutoencoderKLFlux2", {}),
            "block-level groups of AutoencoderKLFlux2",
            "Flux2Pipeline reads bn.running_mean of vae directly",
        ),
    ],
)
def test_what_is_used_by_itself_is_not_put_away(pipeline, name, what, block, disk):
    for found, wanted in zip(refusals(pipeline, name, what), (block, disk), strict=True):
        assert (found is None) == (wanted is None), found
        assert (found or "").startswith(wanted or "")
