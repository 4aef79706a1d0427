"""Encoding a prompt apart from the call: on every family, bit for bit what the ordinary call makes of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch

from tests.support.families import FAMILIES, make_family
from vramplan.pipeline.live import spec_from_pipeline
from vramplan.pipeline.modules import modules_of
from vramplan.pipeline.prompt import EncodeError, call_encoded, encode, encode_refusal
from vramplan.simulator.run import call_inputs

# Why a family's prompt cannot be encoded apart.
REFUSED = {
    "stable-cascade": "has no encode_prompt",
    "kandinsky-2.2": "has no encode_prompt",
    "dit": "has no encode_prompt",
    "ddpm": "has no encode_prompt",
    "consistency": "has no encode_prompt",
    "stable-video": "has no encode_prompt",
    "stable-audio": "runs projection_model before it encodes its prompt",
}
# Pictures that condition the call are repeated by the number it is given, which encoding has already used up.
PICTURES_ONLY_ONCE = ("sdxl-adapter", "wan-image-to-video")
SHORT = [name for name, family in FAMILIES.items() if family.real and name not in REFUSED]


def encoders(pipe: Any) -> list[str]:
    return [part.name for part in spec_from_pipeline(pipe).components if part.role == "text_encoder"]


def output(result: Any) -> torch.Tensor:
    found = next(getattr(result, name) for name in ("images", "frames") if hasattr(result, name))
    return torch.as_tensor(found).nan_to_num(7.0)  # weights at random: some give no number


def arguments(name: str, batch: int) -> dict[str, Any]:
    work = replace(FAMILIES[name].workload, num_images_per_prompt=batch)
    return call_inputs(make_family(name), work) | {"generator": torch.Generator().manual_seed(3)}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SHORT)
def test_the_output_is_that_of_the_ordinary_call(name: str, batch: int) -> None:
    if FAMILIES[name].needs != "diffusers":
        pytest.importorskip(FAMILIES[name].needs)
    if batch > 1 and name in PICTURES_ONLY_ONCE:
        pytest.skip("its picture is repeated apart from its prompt; the planner's own simulation refuses it")
    pipe = make_family(name)
    encoded = encode(pipe, arguments(name, batch), encoders(pipe))
    bare = copy.copy(pipe)
    for part in encoders(pipe):
        setattr(bare, part, None)
    assert torch.equal(output(call_encoded(bare, encoded)), output(pipe(**arguments(name, batch))))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_apart_is_refused_with_the_reason(name: str) -> None:
    pipe = make_family(name)
    with pytest.raises(EncodeError, match=REFUSED[name]):
        encode(pipe, arguments(name, 1), encoders(pipe))


def test_the_call_is_left_as_it_was() -> None:
    pipe = make_family("sd3")
    before = {name: set(vars(part)) for name, part in modules_of(pipe).items()}
    given = arguments("sd3", 1)
    state = given["generator"].get_state()
    encode(pipe, given, encoders(pipe))
    assert torch.equal(given["generator"].get_state(), state)
    assert "encode_prompt" not in vars(pipe)
    assert {name: set(vars(part)) for name, part in modules_of(pipe).items()} == before
    assert not pipe.transformer._forward_pre_hooks


def test_classes_are_told_by_their_source_alone() -> None:
    assert encode_refusal(diffusers.FluxPipeline) is None
    assert "has no encode_prompt" in str(encode_refusal(diffusers.DDPMPipeline))
