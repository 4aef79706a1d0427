"""The numbers of kept, cached, streamed and page-locked blocks that the planner finds are the best of all there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planner.test_decide import QUICK, Simulated, choose
from tests.support.specs import GIB, budget, card, component, pipeline
from vramplan.errors import NothingFitsError
from vramplan.pipeline.types import Component
from vramplan.planner.decision import Decision
from vramplan.planner.demand import Pricer
from vramplan.planner.fixed import Fixed
from vramplan.planner.footprint import AssumedFootprint
from vramplan.planner.pool import CandidatePool
from vramplan.planner.streaming import with_more_kept
from vramplan.planner.table import Table
from vramplan.strategies.base import Placement
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.resident import Resident
from vramplan.strategies.weight_streaming import WeightStreaming, streaming_sizes
from vramplan.streaming.division import STAGE_BYTES, STAGES, divide, totals, worth_streaming
from vramplan.workload import Workload

WORK = Workload(height=512, width=512, num_inference_steps=8)


def every(part: Component) -> Iterator[Placement]:
    """Every setting that there is, by counting."""
    count = len(streaming_sizes(part))
    yield Resident()
    for streamed in (0, *range(3, count + 1)):
        for keep in range(count - streamed + 1):
            for locked in range(count - keep + 1) if count else (0, 1):
                yield WeightStreaming(streamed=streamed, keep=keep, locked=locked)


@settings(QUICK, max_examples=12)
@given(
    st.integers(2, 12), st.integers(1, 20), st.integers(3, 5), st.integers(3, 4), st.integers(1, 9), st.integers(1, 9)
)
def test_nothing_is_faster_than_what_is_chosen(vram, ram, blocks, layers, denoiser, encoder) -> None:
    spec = pipeline(
        component("text_encoder", encoder * GIB, role="text_encoder", blocks=layers),
        component("transformer", denoiser * GIB, blocks=blocks),
        component("vae", GIB // 4, role="vae"),
    )
    price = Pricer(spec, WORK, AssumedFootprint(spec=spec, workload=WORK), card(vram * GIB))
    axes = tuple(tuple({part.name: setting} for setting in every(part)) for part in spec.components)
    best = Table(CandidatePool(axes=axes), price, ()).best((), budget(vram * GIB, ram * GIB), "speed")
    fastest = price(best, ())
    able = fastest.vram_reserved_bytes <= vram * GIB and fastest.ram_bytes <= ram * GIB
    try:
        chosen = choose(spec, vram * GIB, ram=ram * GIB, work=WORK, fixed=Fixed(decode=())).chosen.demand
    except NothingFitsError:
        assert not able
        return
    assert chosen.seconds_per_call <= fastest.seconds_per_call * 1.002 or not able


@settings(QUICK)
@given(st.lists(st.integers(0, 90), max_size=12), st.data())
def test_running_totals_are_the_sums_of_the_blocks(sizes, data) -> None:
    streamed = data.draw(st.integers(0, len(worth_streaming(sizes))))
    keep, level = data.draw(st.integers(0, len(sizes) - streamed)), data.draw(st.integers(0, 600))
    division = divide(sizes, streamed=streamed, keep=keep)
    by_need = [sizes[place] for place in division.by_need]
    total = totals(tuple(sizes), streamed)
    for count in range(len(sizes) + 2):
        locked = by_need[:count]
        assert total.locked(count, keep) == (sum(locked[:streamed]), sum(locked[streamed:]))
    fitting = [count for count in range(len(by_need) + 1) if sum(by_need[:count]) <= level]
    assert total.lockable(level, keep) == fitting[-1]


def test_kept_blocks_fill_the_room_that_levels_leave() -> None:
    spec = pipeline(component("transformer", 40 * GIB, blocks=40))
    chosen = {"transformer": WeightStreaming(streamed=20, keep=2, locked=38)}
    more = with_more_kept(chosen, spec, Fixed(), lambda placed: placed["transformer"].keep <= 13, lambda _: 0.0)
    assert more == {"transformer": WeightStreaming(streamed=20, keep=13, locked=27)}
    fixed = Fixed(placement=chosen)
    assert with_more_kept(chosen, spec, fixed, lambda _: True, lambda _: 0.0) == chosen


def test_whichever_components_keep_more_takes_the_least_time() -> None:
    spec = pipeline(
        component("text_encoder", 9 * GIB, role="text_encoder", blocks=24),
        component("transformer", 10 * GIB, blocks=20),
    )
    chosen = {
        "text_encoder": WeightStreaming(streamed=24, locked=24),
        "transformer": WeightStreaming(streamed=0, keep=2, locked=18),
    }

    def more(prefer: str) -> dict[str, int]:
        found = with_more_kept(
            chosen,
            spec,
            Fixed(),
            lambda placed: sum(each.keep for each in placed.values()) <= 9,
            lambda placed: -placed[prefer].keep,
        )
        return {name: each.keep for name, each in found.items()}

    assert more("transformer") == {"text_encoder": 0, "transformer": 9}
    assert more("text_encoder") == {"text_encoder": 7, "transformer": 2}


@settings(QUICK, max_examples=30)
@given(st.integers(4, 16), st.integers(3, 24), st.integers(3, 30), st.integers(1, 9), st.integers(1, 12))
def test_no_phase_leaves_room_for_a_block_that_could_stay(vram, layers, blocks, encoder, denoiser) -> None:
    spec = pipeline(
        component("text_encoder", encoder * GIB, role="text_encoder", blocks=layers),
        component("transformer", denoiser * GIB, blocks=blocks),
        component("vae", GIB // 4, role="vae"),
    )
    try:
        chosen = choose(spec, vram * GIB, ram=64 * GIB, work=WORK, fixed=Fixed(decode=())).chosen
    except NothingFitsError:
        return
    for name, setting in chosen.placement.items():
        part = spec.component(name)
        sizes = streaming_sizes(part)
        if not isinstance(setting, WeightStreaming) or not sizes:
            continue
        away = [sizes[place] for place in setting.division(part).by_need]
        rest = 0 if setting.keep else part.weight_bytes - sum(sizes)
        left = vram * GIB - chosen.demand.vram_reserved_bytes
        assert left < rest + min(away, default=0), name


def test_blocks_fill_what_a_failed_confirmation_leaves() -> None:
    spec = pipeline(
        component("text_encoder", 9 * GIB, role="text_encoder", blocks=96),
        component("transformer", 20 * GIB, blocks=97),
        component("vae", GIB // 4, role="vae"),
    )
    limit = 9 * GIB
    tried = []

    def confirm(item: Decision) -> Decision:
        tried.append(item)
        over = item.demand.vram_reserved_bytes * 103 // 100 - limit
        return replace(item, verdict="rejected", deficit_bytes=over, reason="no") if over > 0 else item

    footprint = Simulated(spec=spec, workload=WORK)
    chosen = choose(
        spec, limit, ram=128 * GIB, work=WORK, footprint=footprint, fixed=Fixed(decode=()), confirm=confirm
    ).chosen
    assert len(tried) > 1
    assert limit - chosen.demand.vram_reserved_bytes * 103 // 100 < 9 * GIB // 96


def test_buffers_for_copies_count_once_for_all_components() -> None:
    spec = pipeline(
        component("text_encoder", GIB, role="text_encoder", blocks=12), component("transformer", 4 * GIB, blocks=20)
    )
    price = Pricer(spec, WORK, AssumedFootprint(spec=spec, workload=WORK), card(8 * GIB))
    buffers = STAGES * STAGE_BYTES
    pinned = [
        price({"text_encoder": WeightStreaming(locked=first), "transformer": WeightStreaming(locked=second)}, ())
        for first, second in ((12, 20), (0, 20), (0, 0))
    ]
    assert [demand.pinned_bytes for demand in pinned] == [5 * GIB, 4 * GIB + buffers, buffers]
    axes = tuple(
        tuple({part.name: setting} for setting in every(part) if getattr(setting, "streamed", 0) == 0)
        for part in spec.components
    )
    pool = CandidatePool(axes=axes)
    assert [price(placed, ()).ram_bytes for placed in pool.placements] == Table(pool, price, ()).ram.tolist()


def test_a_vae_goes_leaf_by_leaf_beside_a_streamed_denoiser_where_it_does_not_fit_as_a_whole() -> None:
    spec = pipeline(
        component("text_encoder", GIB, role="text_encoder", blocks=12),
        component("transformer", 4 * GIB, blocks=20),
        component("vae", GIB, role="vae"),
    )
    work = Workload(height=1024, width=1024, num_inference_steps=8)
    price = Pricer(spec, work, AssumedFootprint(spec=spec, workload=work), card(9 * GIB))
    whole = price({part.name: WeightStreaming() for part in spec.components}, ())
    assert max(whole.phases, key=lambda phase: phase.reserved_bytes).name == "decode"
    vram = whole.vram_reserved_bytes - GIB // 2
    chosen = choose(spec, vram, ram=64 * GIB, work=work, fixed=Fixed(decode=())).chosen.placement
    assert chosen["vae"] == GroupOffload(type="leaf")
    assert isinstance(chosen["transformer"], WeightStreaming)


@pytest.mark.parametrize(("vram", "ram"), [(6, 16), (12, 16), (16, 16), (12, 24)])
def test_no_other_number_of_the_denoiser_is_faster_where_ram_is_short(vram: int, ram: int) -> None:
    spec = pipeline(
        component("text_encoder", GIB // 4, role="text_encoder", blocks=12),
        component("text_encoder_2", 9 * GIB, role="text_encoder", blocks=24),
        component("transformer", 22 * GIB, blocks=57),
        component("vae", GIB // 4, role="vae"),
    )
    limit = budget(vram * GIB, ram * GIB)
    price = Pricer(spec, WORK, AssumedFootprint(spec=spec, workload=WORK), card(vram * GIB))
    chosen = choose(spec, vram * GIB, ram=ram * GIB, work=WORK, fixed=Fixed(decode=())).chosen
    settings = [each for each in every(spec.component("transformer")) if getattr(each, "keep", 0) % 3 == 0]
    axis = tuple({"transformer": each} for each in settings)
    others = [({name: each},) for name, each in chosen.placement.items() if name != "transformer"]
    best = Table(CandidatePool(axes=(axis, *others)), price, ()).best((), limit, "speed")
    assert chosen.demand.seconds_per_call <= price(best, ()).seconds_per_call * 1.01


@pytest.mark.parametrize("role", ["denoiser", "text_encoder"])
def test_memory_left_idle_is_less_than_a_block_where_anything_is_streamed(role: str) -> None:
    spec = pipeline(
        component("text_encoder", (9 if role == "text_encoder" else 1) * GIB, role="text_encoder", blocks=24),
        component("transformer", 22 * GIB, blocks=57),
        component("vae", GIB // 4, role="vae"),
    )
    for gib in (6, 8, 12, 16):
        demand = choose(spec, gib * GIB, ram=64 * GIB, fixed=Fixed(decode=())).chosen.demand
        denoise = next(phase for phase in demand.phases if phase.name == "denoise")
        assert gib * GIB - denoise.reserved_bytes <= max(GIB // 2, gib * GIB // 20)
