"""What every strategy must be, and the grammar of settings."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import FrozenInstanceError, fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.planner.test_streaming import every
from tests.support.specs import GIB, MIB, WORK, card, component, pipeline, text_to_image
from vramplan.errors import UsageError
from vramplan.strategies import (
    DECODES,
    EXECUTIONS,
    PLACEMENTS,
    REGISTRY,
    WEIGHTS,
    Decode,
    Execution,
    Placement,
    Weights,
)
from vramplan.strategies.base import QUALITIES, Hold, Picture
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.settings import format_setting, is_stock, parse_decode, parse_placement
from vramplan.strategies.vae_slicing import VaeSlicing
from vramplan.strategies.vae_tiling import VaeTiling

SPEC = text_to_image()
ODD = [
    SPEC,
    text_to_image(sequence=None),
    text_to_image(frees_hooks=False),
    text_to_image(excluded=frozenset({"vae"})),
    text_to_image(device_map={"transformer": "0", "vae": "1"}),
    text_to_image(sequence=("text_encoder", "vae")),
    pipeline(component("transformer", 1, role="denoiser")),
]
CARDS = [None, card(), card(kind="mps"), card(unified=True), card(kind="xpu")]


def all_variants() -> list[Any]:
    placements = [setting for cls in PLACEMENTS for part in SPEC.components for setting in cls.variants(part)]
    return placements + [setting for cls in DECODES for setting in cls.variants(SPEC.component("vae"), WORK)]


def test_names_are_unique_and_diffusers_own() -> None:
    assert [cls.name for cls in REGISTRY] == [
        "layerwise_casting",
        "torchao",
        "bitsandbytes",
        "gguf",
        "resident",
        "model_cpu_offload",
        "weight_streaming",
        "group_offload",
        "encode_first",
        "sequential_cpu_offload",
        "vae_slicing",
        "vae_tiling",
        "framewise_decoding",
        "decode_chunk_size",
        "attention_slicing",
        "attention_backend",
        "compile_repeated_blocks",
    ]


@pytest.mark.parametrize("cls", REGISTRY)
def test_a_strategy_keeps_its_contract(cls: Any) -> None:
    kinds: dict[str, Any] = {"weights": (WEIGHTS, Weights), "placement": (PLACEMENTS, Placement)}
    kinds |= {"decode": (DECODES, Decode), "attention": (EXECUTIONS, Execution), "compile": (EXECUTIONS, Execution)}
    registered, protocol = kinds[cls.axis]
    assert cls in registered
    assert cls().quality in QUALITIES
    assert isinstance(cls(), protocol)
    assert is_dataclass(cls)
    assert cls.__doc__
    assert cls() == cls()
    hash(cls())


@pytest.mark.parametrize("cls", PLACEMENTS)
def test_the_code_of_a_stock_placement_needs_no_vramplan(cls: Any) -> None:
    code = "\n".join(cls().code(["transformer"], "cuda:0"))
    assert not (cls.stock and "vramplan" in code)
    assert cls.stock or cls.freed or "vramplan" in code  # one that frees needs more than its own lines


def test_all_others_are_stock() -> None:
    """A request for stock settings leaves out placements alone."""
    assert [cls for cls in REGISTRY if not cls.stock and cls not in PLACEMENTS] == []


def test_a_setting_as_text_is_stock_as_its_strategy_is() -> None:
    for cls in REGISTRY:
        assert is_stock(cls.axis, format_setting(cls())) is cls.stock
    assert not is_stock("placement", "encode_first:leaf=true")
    assert is_stock("decode", "plain")


@pytest.mark.parametrize("cls", REGISTRY)
def test_a_setting_cannot_be_changed(cls: Any) -> None:
    setting = cls()
    for field in fields(cls):
        with pytest.raises(FrozenInstanceError):
            setattr(setting, field.name, None)
    with pytest.raises((AttributeError, TypeError)):
        setting.something_else = 1


@pytest.mark.parametrize("cls", REGISTRY)
def test_options_are_by_keyword_and_have_plain_types(cls: Any) -> None:
    with pytest.raises(TypeError):
        cls("block")
    for field in fields(cls):
        assert isinstance(field.default, bool | int | str)


def test_whole_pipeline_placements_have_no_options() -> None:
    """They are one call for all: an option of one component could not be kept."""
    for cls in PLACEMENTS:
        assert not (cls.whole_pipeline and fields(cls))  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", all_variants(), ids=format_setting)
def test_what_is_tried_can_be_written_and_read(setting: Any) -> None:
    parse = parse_placement if setting.axis == "placement" else parse_decode
    assert parse(format_setting(setting)) == setting


@pytest.mark.parametrize(("text", "stream"), [("true", True), ("True", True), ("false", False), (" FALSE ", False)])
def test_a_switch_is_on_or_off(text: str, stream: bool) -> None:
    assert parse_placement(f" group_offload: stream={text}, type=leaf ") == GroupOffload(type="leaf", stream=stream)


GROUPS = st.builds(
    GroupOffload,
    type=st.sampled_from(["block", "leaf"]),
    blocks=st.integers(),
    stream=st.booleans(),
    record_stream=st.booleans(),
    low_cpu_mem_usage=st.booleans(),
    within=st.from_regex(r"[a-z_]+(/[a-z_]+)*", fullmatch=True) | st.just(""),
)


@given(GROUPS)
def test_any_group_offload_can_be_written_and_read(setting: GroupOffload) -> None:
    assert parse_placement(format_setting(setting)) == setting


@given(st.builds(VaeTiling, tile=st.integers()))
def test_any_tiling_can_be_written_and_read(setting: VaeTiling) -> None:
    assert parse_decode(format_setting(setting)) == setting


@given(st.text())
def test_any_text_is_a_setting_or_a_usage_error(text: str) -> None:
    for parse in (parse_placement, parse_decode):
        for attempt in (text, f"group_offload:{text}", f"vae_tiling:tile={text}"):
            with suppress(UsageError):
                assert parse(attempt).name in {cls.name for cls in REGISTRY}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("residnet", "did you mean resident?"),
        ("", "use one of"),
        ("vae_tiling", "is not a strategy here"),
        ("resident:tile=3", "has no option 'tile'; its options are: none"),
        ("group_offload:type", "type needs a value"),
        ("group_offload:type=leafs", "use one of block, leaf"),
        ("group_offload:stream=yes", "use true or false"),
        ("group_offload:blocks=2.5", "a whole number is needed"),
        ("group_offload:offload_to_disk_path=/tmp/x", "has no option 'offload_to_disk_path'"),
    ],
)
def test_a_setting_that_is_wrong_says_how(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("?", r"\?")):
        parse_placement(text)


@pytest.mark.parametrize("accelerator", CARDS)
@pytest.mark.parametrize("spec", ODD)
def test_a_refusal_is_a_sentence_or_none(spec: Any, accelerator: Any) -> None:
    for cls in PLACEMENTS:
        for part in spec.components:
            for setting in cls.variants(part):
                reason = setting.refusal(part, spec, accelerator)
                assert reason is None or (len(reason) > 20 and " " in reason and "\n" not in reason)


@pytest.mark.parametrize("spec", ODD)
def test_a_hold_never_is_negative_and_runs_on_no_less_than_it_idles_on(spec: Any) -> None:
    for cls in PLACEMENTS:
        for part in spec.components:
            for setting in (*cls.variants(part), *every(part)):
                hold = setting.hold(part, spec)
                counts = [getattr(hold, field.name) for field in fields(Hold)]
                assert min(count for count in counts if isinstance(count, int | float)) >= 0
                assert hold.running_bytes >= hold.idle_bytes
                assert hold.running_bytes == (hold.loop_bytes or hold.running_bytes)
                assert hold.running_bytes <= 3 * part.weight_bytes
                assert 0 < hold.rate <= 1
                assert not (hold.lingers and hold.idle_bytes)


@pytest.mark.parametrize("spec", ODD)
def test_an_offloaded_component_is_somewhere(spec: Any) -> None:
    """Its weights are on the device, in RAM or in files: what is on none would be lost."""
    for cls in PLACEMENTS:
        for part in spec.components:
            for setting in cls.variants(part):
                hold = setting.hold(part, spec)
                assert hold.idle_bytes + hold.host_bytes + hold.pinned_bytes + hold.disk_bytes >= part.weight_bytes


def test_completing_twice_changes_nothing() -> None:
    for cls in PLACEMENTS:
        for part in SPEC.components:
            for setting in cls.variants(part):
                assert setting.complete(part) == setting == setting.complete(part).complete(part)


@pytest.mark.parametrize("cls", PLACEMENTS)
def test_the_code_of_a_placement_is_python_that_names_the_device(cls: Any) -> None:
    for part in SPEC.components:
        for setting in cls.variants(part):
            code = "\n".join(setting.code(["transformer", "vae"], "cuda:1"))
            compile(code, "<plan>", "exec")
            assert "cuda:1" in code
            assert cls.whole_pipeline or ("pipe.transformer" in code and "pipe.vae" in code)


@pytest.mark.parametrize("cls", [VaeSlicing, VaeTiling])
def test_the_code_of_a_decode_does_what_applying_it_does(cls: Any) -> None:
    """On the VAE itself: pipelines of diffusers 0.42 have no enable_vae_tiling any more."""
    from diffusers import AutoencoderKLCogVideoX

    for tile in (0, 96):
        setting = cls(tile=tile) if cls is VaeTiling else cls()
        pipes = []
        for _ in range(2):
            with torch.device("meta"):
                vae = AutoencoderKLCogVideoX(block_out_channels=(4,) * 4, norm_num_groups=2, layers_per_block=1)
            pipes.append(SimpleNamespace(vae=vae, components={"vae": vae}))
        setting.apply(pipes[0], ["vae"])
        exec("\n".join(setting.code(["vae"], pipes[1].components)), {"pipe": pipes[1]})
        applied, coded = (decode_attributes(pipe.vae) for pipe in pipes)
        assert applied == coded
        assert applied["use_tiling" if cls is VaeTiling else "use_slicing"] is True


def decode_attributes(vae: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(vae).items() if name.startswith(("tile_", "use_"))}


@given(height=st.integers(1, 4096), width=st.integers(1, 4096), frames=st.integers(1, 99), batch=st.integers(1, 8))
def test_a_decode_never_enlarges_what_is_worked_on(height: int, width: int, frames: int, batch: int) -> None:
    picture = Picture(height=height, width=width, frames=frames, batch=batch, whole_pixels=height * width)
    vae = SPEC.component("vae")
    for cls in DECODES:
        for setting in cls.variants(vae, WORK):
            shrunk = setting.shrink(picture, vae)
            assert 0 < shrunk.pixels <= picture.pixels
            assert shrunk.whole_pixels == picture.whole_pixels
            assert setting.shrink(shrunk, vae) == shrunk


def test_refusals_of_a_decode_are_sentences() -> None:
    bare = component("vae", 100 * MIB, role="vae", slicing=False, tiling=None)
    for cls in DECODES:
        assert str(cls().refusal(bare, WORK)).startswith("SomeVae has no ")
    for cls in (VaeSlicing, VaeTiling):
        assert cls().refusal(SPEC.component("vae"), WORK) is None
        assert list(cls.variants(SPEC.component("vae"), WORK))


def test_the_largest_component_still_fits_an_int() -> None:
    huge = component("transformer", 4096 * GIB, blocks=64)
    for cls in PLACEMENTS:
        for setting in cls.variants(huge):
            assert isinstance(setting.hold(huge, SPEC).running_bytes, int)
