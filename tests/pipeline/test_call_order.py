"""In which order components run, from roles, sequence and arguments."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest

from tests.support.specs import component
from vramplan.pipeline.call_order import uses_of
from vramplan.pipeline.classes import ClassFacts, class_facts
from vramplan.pipeline.types import Use

ROLES = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder",
    "text_encoder_3": "text_encoder",
    "image_encoder": "image_encoder",
    "unet": "denoiser",
    "transformer": "denoiser",
    "transformer_2": "denoiser",
    "controlnet": "control",
    "vae": "vae",
    "safety_checker": "other",
    "motion_adapter": "other",
    "connectors": "other",
    "vocoder": "other",
}


def uses(cls: str, *names: str) -> tuple[Use, ...]:
    return uses_of([component(name, role=ROLES[name]) for name in names], class_facts(getattr(diffusers, cls)))


def told(found: tuple[Use, ...]) -> list[str]:
    return [f"{use.phase}:{use.component}" for use in found]


def test_text_to_image_encodes_twice_denoises_and_decodes() -> None:
    assert told(uses("StableDiffusionPipeline", "vae", "unet", "text_encoder")) == [
        "encode:text_encoder",
        "encode:text_encoder",
        "denoise:unet",
        "decode:vae",
    ]


def test_several_text_encoders_go_round_in_the_order_of_the_sequence() -> None:
    names = [use.component for use in uses("StableDiffusion3Pipeline", "text_encoder_3", "transformer", "vae",
                                           "text_encoder", "text_encoder_2")]  # fmt: skip
    assert names[:6] == ["text_encoder", "text_encoder_2", "text_encoder_3"] * 2


def test_a_picture_is_encoded_before_the_loop() -> None:
    found = told(uses("StableDiffusionImg2ImgPipeline", "text_encoder", "unet", "vae"))
    assert found[-3:] == ["encode:vae", "denoise:unet", "decode:vae"]


def test_a_controlnet_runs_in_the_loop_before_the_denoiser() -> None:
    found = uses("StableDiffusionControlNetPipeline", "text_encoder", "unet", "controlnet", "vae")
    assert [use.component for use in found if use.in_loop] == ["controlnet", "unet"]


def test_an_image_encoder_may_be_left_out_by_the_call() -> None:
    found = uses("StableDiffusionPipeline", "text_encoder", "image_encoder", "unet", "vae")
    assert [use.component for use in found if use.optional] == ["image_encoder"]
    found = uses("HunyuanImagePipeline", "text_encoder", "text_encoder_2", "transformer", "vae")
    assert {use.component for use in found if use.optional} == {"text_encoder_2"}


def test_a_checker_outside_the_sequence_comes_last() -> None:
    assert told(uses("StableDiffusionPipeline", "safety_checker", "text_encoder", "unet", "vae"))[-2:] == [
        "decode:vae",
        "decode:safety_checker",
    ]


def test_what_the_sequence_puts_before_the_denoiser_runs_before_it() -> None:
    found = told(uses("LTX2Pipeline", "text_encoder", "connectors", "transformer", "vae", "vocoder"))
    assert found.index("encode:connectors") < found.index("denoise:transformer")
    assert found[-1] == "decode:vocoder"


def test_a_motion_adapter_never_runs() -> None:
    found = uses("AnimateDiffPipeline", "text_encoder", "unet", "motion_adapter", "vae")
    assert "motion_adapter" not in [use.component for use in found]


def test_two_denoisers_are_both_in_the_loop() -> None:
    found = uses("WanPipeline", "text_encoder", "transformer", "transformer_2", "vae")
    assert [use.component for use in found if use.in_loop] == ["transformer", "transformer_2"]


@pytest.mark.parametrize("sequence", [None, (), ("vae", "nothing")])
def test_every_component_that_runs_is_used_whatever_the_sequence(sequence) -> None:
    facts: ClassFacts = replace(class_facts(diffusers.StableDiffusionPipeline), sequence=sequence)
    names = [name for name in ROLES if name != "motion_adapter"]
    found = uses_of([component(name, role=ROLES[name]) for name in names], facts)
    assert {use.component for use in found} == set(names)
    phases = [use.phase for use in found]
    assert phases == sorted(phases, key=("encode", "denoise", "decode").index)
