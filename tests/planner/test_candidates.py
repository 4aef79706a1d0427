"""Which combinations are candidates, and what a user may set by hand."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from tests.support.specs import GIB, WORK, budget, card, component, pipeline, text_to_image
from vramplan.errors import UsageError
from vramplan.planner.candidates import CandidateRow, rows
from vramplan.planner.decide import decide
from vramplan.planner.fixed import Fixed, parse_fixed
from vramplan.planner.footprint import AssumedFootprint
from vramplan.planner.other_components import MOST_COMBINATIONS
from vramplan.planner.streaming import _MOST
from vramplan.strategies import PLACEMENTS
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.model_cpu_offload import ModelCpuOffload
from vramplan.strategies.resident import Resident
from vramplan.strategies.vae_slicing import VaeSlicing
from vramplan.strategies.vae_tiling import VaeTiling
from vramplan.workload import Workload

SPEC = text_to_image()


def tried(
    spec: Any = SPEC,
    work: Workload = WORK,
    settings: Any = None,
    accelerator: Any = card(),  # noqa: B008
) -> list[CandidateRow]:
    return rows(spec, work, parse_fixed(settings or {}, spec), accelerator)[0]


def placements(found: list[CandidateRow]) -> list[Any]:
    return [placement for row in found for placement in row.placements]


def test_every_component_has_one_placement_in_every_candidate() -> None:
    for placement in placements(tried()):
        assert set(placement) == {part.name for part in SPEC.components}


def test_whole_pipeline_placements_exclude_all_others() -> None:
    """Never model and sequential together, and never either beside a group."""
    for placement in placements(tried()):
        whole = {setting.name for setting in placement.values() if setting.whole_pipeline}
        assert not whole or {setting.name for setting in placement.values()} == whole
        assert len(whole) <= 1
    names = {setting.name for placement in placements(tried()) for setting in placement.values()}
    assert names == {cls.name for cls in PLACEMENTS}


def test_stock_leaves_no_setting_of_vramplans_own_and_says_so() -> None:
    found, refused = rows(SPEC, WORK, parse_fixed({}, SPEC, stock=True), card())
    names = {setting.name for placement in placements(found) for setting in placement.values()}
    own = {cls.name for cls in PLACEMENTS if not cls.stock}
    assert names == {cls.name for cls in PLACEMENTS} - own
    assert own <= {item.setting.partition(":")[0] for item in refused if "vramplan's own" in item.reason}


@pytest.mark.parametrize(
    "settings", [{"placement.text_encoder": "encode_first"}, {"placement": ["encode_first:leaf=true"]}]
)
def test_a_setting_that_is_not_stock_is_refused_with_stock(settings: Any) -> None:
    parse_fixed(settings, SPEC)
    (key,) = settings
    with pytest.raises(UsageError, match=f'^`settings."{key}".`: encode_first is vramplan\'s own, and `stock`'):
        parse_fixed(settings, SPEC, stock=True)
    parse_fixed({"placement.vae": "group_offload:type=leaf", "decode": "vae_slicing"}, SPEC, stock=True)


def test_no_candidate_holds_a_setting_that_is_refused() -> None:
    for spec in (SPEC, text_to_image(sequence=None), text_to_image(excluded=frozenset({"vae"}))):
        for placement in placements(tried(spec)):
            for name, setting in placement.items():
                assert setting.refusal(spec.component(name), spec, card()) is None


def test_all_resident_is_among_them_and_so_is_each_kind_of_decode() -> None:
    found = tried()
    assert {name: Resident() for name in ("text_encoder", "transformer", "vae")} in placements(found)
    assert () in [row.decode for row in found]
    assert any(isinstance(setting, VaeTiling) for row in found for setting in row.decode)


def test_a_single_picture_is_not_sliced_and_several_are() -> None:
    several = Workload(height=1024, width=1024, num_images_per_prompt=4)
    assert not [row for row in tried() if VaeSlicing() in row.decode]
    decodes = {row.decode for row in tried(work=several)}
    assert (VaeSlicing(),) in decodes
    assert {len(decode) for decode in decodes} == {0, 1, 2}


def test_videos_take_slicing_and_tiling_together() -> None:
    video = Workload(height=480, width=720, num_frames=49)
    decodes = {row.decode for row in tried(text_to_image(video=True), video)}
    assert () in decodes
    for decode in decodes - {()}:
        assert [setting.name for setting in decode] == ["vae_slicing", "vae_tiling"]


def test_denoisers_share_their_setting() -> None:
    parts = [component(name, 4 * GIB, blocks=8) for name in ("transformer", "transformer_2")]
    spec = pipeline(*parts, component("vae", GIB, role="vae"))
    for placement in placements(tried(spec)):
        assert placement["transformer"] == placement["transformer_2"]


def test_a_denoiser_that_cannot_share_takes_the_only_setting_it_has() -> None:
    parts = [component("transformer", 4 * GIB, blocks=8), component("transformer_2", GIB, move_refusal="it stays")]
    found = placements(tried(pipeline(*parts)))
    assert {placement["transformer_2"] for placement in found} == {Resident()}
    assert len({placement["transformer"] for placement in found}) > 1


def test_many_companions_are_thinned_but_keep_resident_and_the_smallest() -> None:
    encoders = [component(f"text_encoder_{index}", GIB, role="text_encoder", blocks=4) for index in range(9)]
    found = tried(pipeline(component("transformer", blocks=4), *encoders))
    for pool in (pool for row in found for pool in row.pools):
        streamed = "WeightStreaming" in str(pool.axes[0])
        assert prod(map(len, pool.axes if streamed else pool.axes[1:])) <= (_MOST if streamed else MOST_COMBINATIONS)
    for part in encoders:
        settings = {placement[part.name] for placement in placements(found)}
        assert {Resident(), GroupOffload(type="leaf")} <= settings


def test_without_an_accelerator_everything_is_where_it_is() -> None:
    found = tried(accelerator=None)
    assert {setting for placement in placements(found) for setting in placement.values()} == {Resident()}
    assert len(found) > 1  # the decode is still open


def test_a_pipeline_of_companions_only_can_be_planned() -> None:
    assert tried(pipeline(component("vae", GIB, role="vae"), component("text_encoder", role="text_encoder")))


class TestByHand:
    def test_one_component(self) -> None:
        found = placements(tried(settings={"placement.transformer": "group_offload:type=leaf,stream=true"}))
        assert {placement["transformer"] for placement in found} == {GroupOffload(type="leaf", stream=True)}
        assert len({placement["text_encoder"] for placement in found}) > 1

    def test_all_components(self) -> None:
        assert {s for p in placements(tried(settings={"placement": "resident"})) for s in p.values()} == {Resident()}
        found = placements(tried(settings={"placement": "model_cpu_offload"}))
        assert {s for p in found for s in p.values()} == {ModelCpuOffload()}

    def test_a_setting_for_all_is_for_those_that_can_take_it(self) -> None:
        found = placements(tried(settings={"placement": "group_offload"}))
        assert {placement["transformer"] for placement in found} == {GroupOffload()}
        assert {placement["text_encoder"] for placement in found} == {GroupOffload()}
        assert Resident() in {placement["vae"] for placement in found}
        assert GroupOffload() not in {placement["vae"] for placement in found}

    def test_one_component_beside_all_others(self) -> None:
        settings = {"placement": "group_offload:type=leaf", "placement.vae": "resident"}
        (placement,) = {tuple(sorted(p.items())) for p in map(dict, placements(tried(settings=settings)))}
        assert dict(placement) == {
            "text_encoder": GroupOffload(type="leaf"),
            "transformer": GroupOffload(type="leaf"),
            "vae": Resident(),
        }

    def test_the_blocks_of_a_text_encoder_are_found_by_themselves(self) -> None:
        encoder = component("text_encoder", role="text_encoder", blocks=4)
        geometry = type(encoder.geometry)(
            **{n: getattr(encoder.geometry, n) for n in encoder.geometry.__slots__} | {"block_modules": ("a", "b")}
        )
        spec = pipeline(component("transformer", blocks=4), component("text_encoder", role="text_encoder",
                        geometry=geometry))  # fmt: skip
        fixed = parse_fixed({"placement.text_encoder": "group_offload"}, spec)
        assert fixed.placement["text_encoder"] == GroupOffload(within="a/b")

    def test_the_decode(self) -> None:
        assert {row.decode for row in tried(settings={"decode": "plain"})} == {()}
        assert {row.decode for row in tried(settings={"decode": []})} == {()}
        both = tried(settings={"decode": ["vae_slicing", "vae_tiling:tile=256"]})
        assert {row.decode for row in both} == {(VaeSlicing(), VaeTiling(tile=256))}

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (
                {"attention": "sage"},
                "the axes are weights.COMPONENT, attention.COMPONENT, placement, placement.COMPONENT, ",
            ),
            ({"decode.vae": "vae_tiling"}, "the axes are"),
            ({"": "resident"}, "the axes are"),
            ({"placement.unet": "resident"}, "SomePipeline has no unet, only text_encoder, transformer, vae"),
            ({"placement.": "resident"}, "the axes are"),
            ({"placement": "vae_tiling"}, "is not a strategy here"),
            ({"decode": "resident"}, "is not a strategy here"),
            ({"placement.vae": "model_cpu_offload"}, "never for vae alone: set placement=model_cpu_offload"),
            ({"placement.vae": "sequential_cpu_offload"}, "is for the whole pipeline"),
            ({"placement": "model_cpu_offload", "placement.vae": "resident"}, "it excludes vae"),
            ({"placement": []}, "give one setting, not 0"),
            ({"decode": ["vae_tiling:tile=256", "vae_tiling:tile=128"]}, "vae_tiling is given twice"),
        ],
    )
    def test_what_cannot_stand_there(self, settings: Any, words: str) -> None:
        with pytest.raises(UsageError, match=words):
            parse_fixed(settings, SPEC)

    @pytest.mark.parametrize("text", ["group_offload", "model_cpu_offload", "sequential_cpu_offload"])
    def test_offload_on_the_cpu(self, text: str) -> None:
        with pytest.raises(UsageError, match="needs an accelerator, and none was found"):
            tried(settings={"placement": text}, accelerator=None)
        assert tried(settings={"placement": "resident"}, accelerator=None)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"placement.transformer": "group_offload:blocks=0"}, "at least one block"),
            ({"decode": "vae_tiling:tile=100"}, "use 128, 64"),
            ({"decode": "vae_tiling:tile=4096"}, "do not overlap evenly"),
            ({"decode": "vae_tiling:tile=-512"}, "do not overlap evenly"),
        ],
    )
    def test_a_setting_that_cannot_be_ends_the_planning_with_its_reason(self, settings: Any, words: str) -> None:
        footprint = AssumedFootprint(spec=SPEC, workload=WORK)
        with pytest.raises(UsageError, match=words):
            decide(SPEC, WORK, budget(), accelerator=card(), footprint=footprint, fixed=parse_fixed(settings, SPEC))

    def test_a_hand_set_setting_is_in_the_chosen_plan(self) -> None:
        footprint = AssumedFootprint(spec=SPEC, workload=WORK)
        fixed = parse_fixed({"placement.transformer": "group_offload", "decode": "vae_tiling:tile=256"}, SPEC)
        chosen = decide(SPEC, WORK, budget(), accelerator=card(), footprint=footprint, fixed=fixed).chosen
        assert chosen.placement["transformer"] == GroupOffload()
        assert chosen.decode == (VaeTiling(tile=256),)


def test_refusals_name_setting_component_and_reason_once_each() -> None:
    _, refused = rows(SPEC, WORK, Fixed(), card(kind="mps"))
    assert refused
    assert len({(item.setting, item.reason) for item in refused}) == len(refused)
    for item in refused:
        assert item.component in {part.name for part in SPEC.components}
        assert len(item.reason.split()) > 3
