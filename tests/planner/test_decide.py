"""The choice: the fastest that fits, lossless first, with every number said."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.support.profiles import profile_spec
from tests.support.specs import GIB, MIB, WORK, budget, card, component, geometry, pipeline, text_to_image
from vramplan.errors import NothingFitsError
from vramplan.pipeline.types import PipelineSpec, Use
from vramplan.planner.candidates import rows
from vramplan.planner.decide import Alternative, _explain_fastest, decide
from vramplan.planner.decision import Decision, Outcome, worst_quality
from vramplan.planner.demand import Pricer
from vramplan.planner.fixed import Fixed, parse_fixed
from vramplan.planner.footprint import AssumedFootprint, Estimate
from vramplan.profiles.catalogue import load_pipeline_profile, pipeline_names
from vramplan.strategies.resident import Resident
from vramplan.strategies.sequential_cpu_offload import SequentialCpuOffload
from vramplan.strategies.torchao import Torchao
from vramplan.strategies.vae_slicing import VaeSlicing
from vramplan.strategies.vae_tiling import VaeTiling
from vramplan.strategies.weight_streaming import WeightStreaming
from vramplan.units import format_seconds
from vramplan.workload import Workload

NUMBERS = re.compile(r"needs ([\d.]+ [KMGT]iB) of (VRAM|RAM), ([\d.]+ [KMGT]iB) may be used: short by [\d.]+ [KMGT]iB")
QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def choose(spec: PipelineSpec, vram: int | None, *, work: Workload = WORK, **options: Any) -> Outcome:
    told: dict[str, Any] = {
        "accelerator": None if vram is None else card(max(vram, 1)),
        "footprint": AssumedFootprint(spec=spec, workload=work),
        "fixed": Fixed(),
    }
    ram = options.pop("ram", 512 * GIB)
    return decide(spec, work, budget(vram, ram), **(told | options))


def chosen_or_numbers(spec: PipelineSpec, vram: int, **options: Any) -> Outcome | None:
    """None where nothing fits; the refusal says both numbers."""
    try:
        return choose(spec, vram, **options)
    except NothingFitsError as error:
        refusal = str(error)
    assert NUMBERS.search(refusal)
    return None


def facts(outcome: Outcome) -> tuple[Any, ...]:
    return tuple((item.placement, item.decode, item.verdict, item.reason) for item in outcome.decisions)


SIZES = st.integers(1 * MIB, 24 * GIB)


@st.composite
def specs(draw: Any) -> PipelineSpec:
    parts = [
        component("text_encoder", draw(SIZES), role="text_encoder", blocks=draw(st.sampled_from([0, 4]))),
        component("transformer", draw(SIZES), blocks=draw(st.sampled_from([0, 3, 12]))),
        component("vae", draw(st.integers(MIB, GIB)), role="vae"),
    ]
    if draw(st.booleans()):
        parts.append(component("image_encoder", draw(SIZES), role="image_encoder"))
    names = draw(st.permutations([part.name for part in parts]))
    return pipeline(
        *parts,
        sequence=draw(st.sampled_from([None, tuple(names), tuple(names[:2])])),
        conditions=draw(st.booleans()),
        video=draw(st.booleans()),
        excluded=frozenset(draw(st.sampled_from([[], ["vae"], ["text_encoder"]]))),
    )


WORKS = st.builds(
    Workload,
    height=st.sampled_from([256, 512, 1024]),
    width=st.sampled_from([512, 1280]),
    num_frames=st.sampled_from([1, 17]),
    num_images_per_prompt=st.sampled_from([1, 3]),
    num_inference_steps=st.integers(1, 60),
)
VRAM = st.integers(2, 160).map(lambda halves: halves * GIB // 2)


def test_with_little_ram_the_prompt_is_encoded_first() -> None:
    """16 GiB of RAM and 24 of VRAM: encoder and transformer fit neither together on the card nor in RAM."""
    spec = text_to_image(encoder=9 * GIB, denoiser=19 * GIB)
    able = {
        str(item.placement): item for item in choose(spec, 24 * GIB, ram=6 * GIB).decisions if not item.deficit_bytes
    }
    assert any("EncodeFirst" in text for text in able)
    assert "encode_first" not in str(choose(spec, 32 * GIB, ram=6 * GIB).chosen.placement)


@pytest.mark.parametrize("gib", [6, 7, 8])
def test_room_beside_a_resident_denoiser_goes_to_the_encoder(gib: int) -> None:
    """As many blocks of a large encoder as fit stay: at most one of them is left idle, however the rest comes."""
    spec = pipeline(
        component("text_encoder", 9 * GIB, role="text_encoder", blocks=24),
        component("transformer", GIB, blocks=28),
        component("vae", GIB // 4, role="vae"),
    )
    for ram in (1, 64):  # from files, from page-locked memory
        chosen = choose(spec, gib * GIB, ram=ram * GIB, work=Workload(height=512, width=512)).chosen
        setting = chosen.placement["text_encoder"]
        assert isinstance(setting, WeightStreaming)
        assert setting.keep
        assert gib * GIB - chosen.demand.vram_reserved_bytes < GIB // 2


def test_with_little_ram_as_many_blocks_as_fit_are_page_locked_and_not_read_from_files() -> None:
    spec = text_to_image(encoder=GIB, denoiser=22 * GIB)
    chosen = [choose(spec, gib * GIB, ram=8 * GIB).chosen for gib in (8, 12)]
    less, more = (item.placement["transformer"] for item in chosen)
    assert isinstance(less, WeightStreaming)
    assert isinstance(more, WeightStreaming)
    assert 0 < more.streamed < less.streamed
    for item in chosen:
        assert 6 * GIB < item.demand.pinned_bytes <= item.demand.ram_bytes <= 8 * GIB
        assert item.demand.disk_bytes == 0


def test_who_cannot_be_loaded_says_which_component_and_both_numbers() -> None:
    parts = [
        replace(part, converted_at_load=True) for part in text_to_image(encoder=9 * GIB, denoiser=8 * GIB).components
    ]
    outcome = choose(pipeline(*parts), 24 * GIB, ram=4 * GIB)
    told = [item.reason for item in outcome.decisions if "loading" in item.reason and item.verdict == "rejected"]
    assert any(re.match(r"loading \w+ needs [\d.]+ GiB of RAM, 4.00 GiB may be used: short by", text) for text in told)


@pytest.mark.usefixtures("_small_tables")
class TestAnyPipeline:
    @QUICK
    @given(specs(), WORKS, VRAM, VRAM, st.sampled_from(["lossless", "near_lossless"]))
    def test_more_memory_never_makes_the_plan_slower(self, spec, work, one, other, allow) -> None:
        """At a quality that is given: where none is, more memory may also buy a lossless plan."""
        less, more = sorted((one, other))
        try:
            small = choose(spec, less, work=work, allow=allow).chosen.demand.seconds_per_call
        except NothingFitsError:
            return
        large = choose(spec, more, work=work, allow=allow).chosen.demand.seconds_per_call
        assert large <= small * 1.01  # times count to their third digit

    @QUICK
    @given(specs(), WORKS, VRAM, st.integers(1, 64), st.integers(1, 64))
    def test_more_ram_never_makes_a_plan_slower_that_converts_while_loading(self, spec, work, vram, one, other) -> None:
        less, more = sorted((one, other))
        loaded = [replace(part, converted_at_load=True) for part in spec.components]
        spec = replace(spec, components=tuple(loaded))
        try:
            small = choose(spec, vram, work=work, ram=less * GIB, allow="lossless").chosen.demand.seconds_per_call
        except NothingFitsError:
            return
        large = choose(spec, vram, work=work, ram=more * GIB, allow="lossless").chosen.demand.seconds_per_call
        assert large <= small * 1.01  # times count to their third digit

    @QUICK
    @given(specs(), WORKS, VRAM, st.integers(1, 128))
    def test_a_chosen_plan_is_within_the_budget(self, spec, work, vram, ram) -> None:
        outcome = chosen_or_numbers(spec, vram, work=work, ram=ram * GIB)
        if outcome is None:
            return
        demand = outcome.chosen.demand
        assert demand.vram_reserved_bytes <= vram
        assert demand.ram_bytes <= ram * GIB
        assert demand.vram_allocated_bytes <= demand.vram_reserved_bytes
        assert outcome.chosen.deficit_bytes == 0
        assert [item.verdict for item in outcome.decisions].count("chosen") == 1

    @QUICK
    @given(specs(), WORKS, VRAM)
    def test_the_same_question_has_the_same_answer(self, spec, work, vram) -> None:
        try:
            assert facts(choose(spec, vram, work=work)) == facts(choose(spec, vram, work=work))
        except NothingFitsError as error:
            with pytest.raises(NothingFitsError, match=re.escape(str(error))):
                choose(spec, vram, work=work)

    @QUICK
    @given(specs(), VRAM)
    def test_who_does_not_fit_says_so_with_both_numbers(self, spec, vram) -> None:
        try:
            outcome = choose(spec, vram)
        except NothingFitsError:
            assume(False)
        for item in outcome.decisions:
            assert bool(NUMBERS.search(item.reason)) == bool(item.deficit_bytes) or item.verdict == "chosen"
            assert (item.verdict == "rejected") or not item.deficit_bytes
            assert item.reason

    @QUICK
    @given(specs(), WORKS, VRAM)
    def test_nothing_that_fits_at_that_quality_is_faster(self, spec, work, vram) -> None:
        try:
            outcome = choose(spec, vram, work=work, allow="near_lossless")
        except NothingFitsError:
            return
        for item in outcome.decisions[1:]:
            if not item.deficit_bytes:
                assert item.demand.seconds_per_call >= outcome.chosen.demand.seconds_per_call * 0.99

    @settings(QUICK, max_examples=5)  # thousands of candidates each
    @given(specs(), WORKS, VRAM, st.integers(4, 64))
    def test_the_choice_is_the_best_of_every_candidate_priced_one_by_one(self, spec, work, vram, ram) -> None:
        """What `decide` does not price one by one could not have been chosen."""
        price = Pricer(spec, work, AssumedFootprint(spec=spec, workload=work), card(vram))
        plain = Fixed(decode=())
        found, _ = rows(spec, work, plain, card(vram))
        every = (price(placement, row.decode) for row in found for placement in row.placements)
        able = [d.seconds_per_call for d in every if d.vram_reserved_bytes <= vram and d.ram_bytes <= ram * GIB]
        try:
            chosen = choose(spec, vram, work=work, ram=ram * GIB, fixed=plain).chosen.demand
        except NothingFitsError:
            assert not able
            return
        assert float(f"{chosen.seconds_per_call:.3g}") == float(f"{min(able):.3g}")

    @QUICK
    @given(specs(), VRAM)
    def test_preferring_memory_takes_no_more_of_it(self, spec, vram) -> None:
        try:
            speed, memory = (choose(spec, vram, prefer=prefer, allow="lossless") for prefer in ("speed", "memory"))
        except NothingFitsError:
            return
        assert memory.chosen.demand.vram_reserved_bytes <= speed.chosen.demand.vram_reserved_bytes
        assert memory.chosen.demand.seconds_per_call >= speed.chosen.demand.seconds_per_call * 0.99

    @QUICK
    @given(specs(), WORKS)
    def test_the_cpu_is_charged_everything_in_ram(self, spec, work) -> None:
        outcome = choose(spec, None, work=work, ram=4096 * GIB)
        demand = outcome.chosen.demand
        assert demand.vram_reserved_bytes == demand.vram_allocated_bytes == demand.pinned_bytes == 0
        assert demand.ram_bytes > spec.weight_bytes
        assert set(outcome.chosen.placement.values()) == {Resident()}

    @QUICK
    @given(specs(), WORKS, VRAM, st.integers(1, 128), st.integers(1, 128))
    def test_more_ram_never_makes_the_plan_slower(self, spec, work, vram, one, other) -> None:
        less, more = sorted((one, other))
        try:
            small = choose(spec, vram, work=work, ram=less * GIB, allow="near_lossless").chosen.demand
        except NothingFitsError:
            return
        large = choose(spec, vram, work=work, ram=more * GIB, allow="near_lossless").chosen.demand
        assert large.seconds_per_call <= small.seconds_per_call * 1.01

    @QUICK
    @given(specs(), WORKS, VRAM)
    def test_no_candidate_is_told_twice(self, spec, work, vram) -> None:
        try:
            outcome = choose(spec, vram, work=work)
        except NothingFitsError:
            return
        told = [(sorted(item.placement.items()), item.decode, dict(item.weights)) for item in outcome.decisions]
        assert all(told.count(item) == 1 for item in told)

    @QUICK
    @given(specs(), WORKS, VRAM, st.randoms(use_true_random=False))
    def test_the_order_of_components_does_not_matter(self, spec, work, vram, random) -> None:
        shuffled = list(spec.components)
        random.shuffle(shuffled)
        other = replace(spec, components=tuple(shuffled))
        try:
            chosen = choose(spec, vram, work=work).chosen
        except NothingFitsError:
            with pytest.raises(NothingFitsError):
                choose(other, vram, work=work)
            return
        again = choose(other, vram, work=work).chosen
        assert again.decode == chosen.decode
        assert replace(again.demand, phases=()) == replace(chosen.demand, phases=())
        assert dict(again.placement) == dict(chosen.placement)

    @QUICK
    @given(specs(), WORKS, VRAM, st.data())
    def test_lighter_weights_never_ask_for_more(self, spec, work, vram, data) -> None:
        part = data.draw(st.sampled_from(spec.components))
        blocks = len(part.geometry.blocks)
        smaller = replace(
            part, weight_bytes=part.weight_bytes // 2, geometry=geometry(part.weight_bytes // 2, blocks=blocks)
        )
        light = replace(spec, components=tuple(smaller if c is part else c for c in spec.components))
        footprint = AssumedFootprint(spec=spec, workload=work)
        heavy_price, light_price = (Pricer(s, work, footprint, card(vram)) for s in (spec, light))
        for row in rows(spec, work, Fixed(), card(vram))[0][:6]:
            placement = data.draw(st.sampled_from(row.placements))
            before, after = heavy_price(placement, row.decode), light_price(placement, row.decode)
            assert after.vram_reserved_bytes <= before.vram_reserved_bytes
            assert after.ram_bytes <= before.ram_bytes
            assert after.seconds_per_call <= before.seconds_per_call * 1.001

    @QUICK
    @given(specs(), WORKS, VRAM)
    def test_a_confirmation_that_fails_gives_way_to_less(self, spec, work, vram) -> None:
        """What is confirmed to be short is never chosen, and what is chosen was confirmed."""
        footprint = Simulated(spec=spec, workload=work)
        asked = []

        def confirm(item: Decision) -> Decision:
            asked.append(item)
            short = item.demand.vram_reserved_bytes + GIB // 4 - vram
            return replace(item, verdict="rejected", deficit_bytes=short, reason="no") if short > 0 else item

        try:
            chosen = choose(spec, vram, work=work, footprint=footprint, confirm=confirm).chosen
        except NothingFitsError:
            return
        assert chosen.demand.vram_reserved_bytes + GIB // 4 <= vram
        assert any(item.placement == chosen.placement and item.decode == chosen.decode for item in asked)
        assert len({(tuple(sorted(i.placement.items(), key=str)), i.decode) for i in asked}) == len(asked)

    @QUICK
    @given(specs(), WORKS, VRAM, st.sampled_from([1.0, 3.0]))
    def test_too_large_a_step_down_costs_next_to_nothing(self, spec, work, vram, guess) -> None:
        """What is passed over because it was said to be shorter than it is comes back where it is faster."""
        footprint = Simulated(spec=spec, workload=work)
        limit = vram - GIB // 4

        def confirm(item: Decision) -> Decision:
            over = item.demand.vram_reserved_bytes - limit
            return replace(item, verdict="rejected", deficit_bytes=int(over * guess), reason="no") if over > 0 else item

        options = {"work": work, "footprint": footprint}
        try:
            best = choose(spec, limit, **options).chosen
        except NothingFitsError:
            with pytest.raises(NothingFitsError):
                choose(spec, vram, confirm=confirm, **options)
            return
        chosen = choose(spec, vram, confirm=confirm, **options).chosen
        assert chosen.demand.vram_reserved_bytes <= limit
        if chosen.quality == best.quality:
            assert chosen.demand.seconds_per_call <= best.demand.seconds_per_call * 1.02

    def test_every_kind_of_placement_is_tried_before_nothing_fits(self) -> None:
        """One kind is said to be short by more than there is, another is not. None is asked for twice, or left out."""
        spec = text_to_image()
        asked: list[Any] = []

        def confirm(item: Decision) -> Decision:
            asked.append((dict(item.placement), item.decode))
            if isinstance(item.placement["transformer"], SequentialCpuOffload):
                return item
            return replace(item, verdict="rejected", deficit_bytes=100 * GIB, reason="no")

        options: dict[str, Any] = {"footprint": Simulated(spec=spec, workload=WORK), "allow": "lossless"}
        outcome = choose(spec, 16 * GIB, confirm=confirm, **options)
        assert isinstance(outcome.chosen.placement["transformer"], SequentialCpuOffload)
        assert all(one not in asked[:place] for place, one in enumerate(asked))
        lossless = {str(row.decode) for row in rows(spec, WORK, Fixed(), card(16 * GIB))[0]}
        assert {str(item.decode) for item in outcome.decisions} == lossless

        def none(item: Decision) -> Decision:
            asked.append((dict(item.placement), item.decode))
            return replace(item, verdict="rejected", deficit_bytes=GIB, reason="no")

        asked.clear()
        with pytest.raises(NothingFitsError, match="the nearest candidate: no"):
            choose(spec, 16 * GIB, confirm=none, footprint=options["footprint"])
        assert all(one not in asked[:place] for place, one in enumerate(asked))
        assert {str(decode) for _, decode in asked} == lossless, "a second quality goes on where the first ended"


class Simulated(AssumedFootprint):
    """The same figures, called simulated: worth confirming."""

    def activation(self, use: Use, decode: Any) -> Estimate:
        return replace(super().activation(use, decode), basis="simulated")


class TestQuality:
    """Weights that leave room for a tile of the picture, and not for the whole."""

    spec = text_to_image()

    def test_tiling_only_where_nothing_lossless_fits(self) -> None:
        large = Workload(height=2048, width=2048)
        outcome = choose(self.spec, 8 * GIB, work=large)
        assert outcome.chosen.quality == "near_lossless"
        assert all(item.deficit_bytes for item in outcome.decisions if item.quality == "lossless")
        assert choose(self.spec, 80 * GIB, work=large).chosen.quality == "lossless"

    def test_lossless_only_is_an_error_then(self) -> None:
        large = Workload(height=2048, width=2048)
        with pytest.raises(NothingFitsError, match='nothing lossless fits; `allow="near_lossless"` would') as caught:
            choose(self.spec, 8 * GIB, work=large, allow="lossless")
        assert caught.value.exit_code == 3

    def test_a_faster_tiled_plan_is_told_and_not_taken(self) -> None:
        outcomes = [choose(self.spec, half * GIB // 2) for half in range(8, 60, 4)]
        told = [
            item
            for outcome in outcomes
            for item in outcome.decisions
            if item.verdict == "rejected" and not item.deficit_bytes
        ]
        assert told
        assert all('but is only near lossless: `allow="near_lossless"`' in item.reason for item in told)

    def test_allowed_tiling_is_taken_where_it_is_faster(self) -> None:
        gained = 0
        for half in range(8, 60, 4):
            plain = choose(self.spec, half * GIB // 2).chosen.demand.seconds_per_call
            allowed = choose(self.spec, half * GIB // 2, allow="near_lossless").chosen
            assert allowed.demand.seconds_per_call <= plain * 1.01
            gained += allowed.quality == "near_lossless"
        assert gained

    def test_tiling_is_not_taken_for_its_own_sake(self) -> None:
        assert choose(self.spec, 80 * GIB, allow="near_lossless").chosen.decode == ()

    def test_a_video_takes_slicing_and_tiling_together(self) -> None:
        work = Workload(height=480, width=720, num_frames=49)
        video = text_to_image(video=True)
        outcome = choose(video, 16 * GIB, work=work)
        assert [setting.name for setting in outcome.chosen.decode] == ["vae_slicing", "vae_tiling"]

    def test_the_quality_is_that_of_the_worst_setting(self) -> None:
        assert worst_quality([]) == worst_quality([Resident(), VaeSlicing()]) == "lossless"
        assert worst_quality([Resident(), VaeTiling(), VaeSlicing()]) == "near_lossless"


def test_ram_that_does_not_suffice_is_told_too() -> None:
    spec = text_to_image()
    fixed = parse_fixed({"placement": "sequential_cpu_offload"}, spec)
    with pytest.raises(NothingFitsError, match=r"RAM, 1\.00 GiB may be used"):
        choose(spec, 4 * GIB, ram=GIB, fixed=fixed)


def test_the_nearest_candidate_is_the_one_named() -> None:
    with pytest.raises(NothingFitsError) as caught:
        choose(text_to_image(), 64 * MIB)
    (needed, memory, usable) = NUMBERS.search(str(caught.value)).groups()
    assert (memory, usable) == ("VRAM", "64 MiB")
    assert needed.endswith("MiB") or float(needed.split()[0]) < 10


def test_the_chosen_ones_reason_names_a_faster_one_that_fails() -> None:
    assert choose(text_to_image(), 80 * GIB).chosen.reason == "the fastest of all candidates, and it fits"
    slow = card(rates=replace(card().rates, link_bytes_per_s=1e8))
    reason = choose(text_to_image(), 4 * GIB, accelerator=slow).chosen.reason
    assert reason.startswith("the fastest that fits; a faster one: ")
    assert NUMBERS.search(reason) or "`allow=" in reason


def test_who_prefers_memory_is_told_what_that_costs_in_time() -> None:
    for ram in (8, 64):
        found = {
            prefer: choose(text_to_image(), 24 * GIB, ram=ram * GIB, prefer=prefer) for prefer in ("speed", "memory")
        }
        chosen, fastest = found["memory"].chosen, found["speed"].chosen
        assert chosen.demand.vram_reserved_bytes < fastest.demand.vram_reserved_bytes
        told = re.fullmatch(
            r"takes the least memory of all that fit; (\d+)% slower than the fastest that fits \((.*) a call\)",
            chosen.reason,
        )
        assert int(told[1]) == round((chosen.demand.seconds_per_call / fastest.demand.seconds_per_call - 1) * 100)
        assert told[2] == format_seconds(fastest.demand.seconds_per_call)
    only = parse_fixed({"placement": "resident"}, text_to_image())
    reason = choose(text_to_image(), 80 * GIB, prefer="memory", fixed=only, allow="lossless").chosen.reason
    assert reason == "takes the least memory of all that fit; none that fits is faster"


def test_a_little_faster_one_that_does_not_fit_is_not_denied() -> None:
    chosen = choose(text_to_image(), 24 * GIB).chosen
    seconds = chosen.demand.seconds_per_call * 0.97
    other = replace(chosen, verdict="rejected", demand=replace(chosen.demand, seconds_per_call=seconds))
    assert _explain_fastest(chosen, [], lambda demand: []).reason == "the fastest of all candidates, and it fits"
    assert _explain_fastest(chosen, [other], lambda demand: []).reason == "the fastest that fits; none is 5% faster"


def profile_plan(name: str, gib: int, **options: Any) -> Outcome:
    profile = load_pipeline_profile(name)
    told = profile.workload
    work = Workload(
        height=told.height,
        width=told.width,
        num_frames=told.num_frames or 1,
        num_inference_steps=told.num_inference_steps,
        guidance_scale=told.guidance_scale,
    )
    return choose(profile_spec(name), gib * GIB, work=work, **options)


BUDGETS = (4, 8, 24, 320)


@pytest.mark.parametrize("name", pipeline_names())
def test_golden_plans_of_the_bundled_profiles(name: str) -> None:
    """On every size of card: within it, never slower than on a smaller one, resident at the end."""
    slowest = float("inf")
    for gib in BUDGETS:
        try:
            chosen = profile_plan(name, gib, allow="near_lossless").chosen
        except NothingFitsError:
            assert slowest == float("inf"), f"{gib} GiB should do what less did"
            continue
        assert chosen.demand.vram_reserved_bytes <= gib * GIB
        assert chosen.demand.seconds_per_call <= slowest * 1.01
        slowest = chosen.demand.seconds_per_call
    assert slowest < float("inf")
    assert set(chosen.placement.values()) == {Resident()}


@pytest.mark.parametrize(
    ("name", "gib", "resident"),
    [
        ("flux.1-dev", 48, True),
        ("flux.1-dev", 24, False),
        ("stable-diffusion-xl", 24, True),
        ("stable-diffusion-1.5", 8, True),
        ("cogvideox-5b", 12, False),
    ],
)
def test_a_well_known_pipeline_is_resident_where_it_fits(name: str, gib: int, resident: bool) -> None:
    assert (set(profile_plan(name, gib).chosen.placement.values()) == {Resident()}) is resident


def test_cogvideox_on_twelve_gib_tiles() -> None:
    assert any(isinstance(setting, VaeTiling) for setting in profile_plan("cogvideox-5b", 12).chosen.decode)
    assert not any(isinstance(setting, VaeTiling) for setting in profile_plan("cogvideox-5b", 80).chosen.decode)


def test_flux_never_goes_leaf_by_leaf_where_blocks_fit() -> None:
    for gib in (12, 16, 24):
        chosen = profile_plan("flux.1-dev", gib).chosen
        assert "sequential_cpu_offload" not in {setting.name for setting in chosen.placement.values()}


def test_settings_by_hand_win_over_speed() -> None:
    spec = profile_spec("stable-diffusion-xl")
    fixed = parse_fixed({"placement": "sequential_cpu_offload"}, spec)
    assert set(profile_plan("stable-diffusion-xl", 80, fixed=fixed).chosen.placement.values()) == {
        SequentialCpuOffload()
    }


def test_changed_weights_are_chosen_within_their_own_budget() -> None:
    """The lighter form fits the budget of all others, but not its own, from which more is kept free."""
    heavy, light = text_to_image(denoiser=30 * GIB), text_to_image(denoiser=10 * GIB)
    form = Alternative(
        weights={"transformer": Torchao()}, spec=light, footprint=AssumedFootprint(spec=light, workload=WORK)
    )
    fixed = Fixed(everywhere=Resident())
    options = {"fixed": fixed, "alternatives": (form,), "allow": "lossy"}
    found = choose(heavy, 24 * GIB, **options)
    assert found.chosen.weights
    narrow = budget(found.chosen.demand.vram_reserved_bytes - 1, 512 * GIB)
    with pytest.raises(NothingFitsError, match="short by 1 B"):
        choose(heavy, 24 * GIB, quantized_budget=narrow, **options)
    exact = budget(found.chosen.demand.vram_reserved_bytes, 512 * GIB)
    assert choose(heavy, 24 * GIB, quantized_budget=exact, **options).chosen.weights
