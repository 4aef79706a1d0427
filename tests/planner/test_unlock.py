"""What one change would let a faster candidate fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.specs import GIB, MIB, budget, card, text_to_image
from vramplan.pipeline.describe import describe
from vramplan.planner.demand import Pricer
from vramplan.planner.footprint import AssumedFootprint
from vramplan.planner.unlock import unlocks
from vramplan.strategies.resident import Resident
from vramplan.workload import Workload

SPEC = text_to_image()
WORK = Workload(height=2048, width=1024)


def demand(work: Workload = WORK):
    placement = {part.name: Resident() for part in SPEC.components}
    footprint = AssumedFootprint(spec=SPEC, workload=work)
    return Pricer(SPEC, work, footprint, card())(placement, ())


def test_what_fits_needs_no_change() -> None:
    assert unlocks(demand(), budget(80 * GIB), SPEC, WORK, card()) == []


def test_each_way_is_named_with_its_number() -> None:
    needed = demand().vram_reserved_bytes
    held = card(24 * GIB, free_bytes=23 * GIB)
    ways = unlocks(demand(), budget(needed - GIB // 2), SPEC, WORK, held)
    assert re.fullmatch(r"\d+ x \d+", ways[0])
    assert ways[1:] == ["closing the programs that hold 1.00 GiB of the card", "0.50 GiB more VRAM"]


def test_a_smaller_picture_keeps_its_shape_and_would_really_fit() -> None:
    limit = demand().vram_reserved_bytes - 2 * GIB
    (size, *_) = unlocks(demand(), budget(limit), SPEC, WORK, card())
    width, height = map(int, size.split(" x "))
    assert height / width == pytest.approx(2, rel=0.05)
    assert width % 16 == height % 16 == 0
    assert demand(replace(WORK, width=width, height=height)).vram_reserved_bytes <= limit


def test_a_smaller_picture_is_one_that_the_pipeline_takes() -> None:
    """Sana's VAE makes 32 pixels of each latent: 1008 would be refused by its own call."""
    spec = describe("sana-1600m-1024").spec
    work = Workload(height=1024, width=1024)
    footprint = AssumedFootprint(spec=spec, workload=work)
    placement = {part.name: Resident() for part in spec.components}
    needed = Pricer(spec, work, footprint, card())(placement, ())
    sizes = set()
    for short in range(1, 64):
        for way in unlocks(needed, budget(needed.vram_reserved_bytes - short * 32 * MIB), spec, work, None):
            sizes |= {int(side) for side in way.split(" x ")} if " x " in way else set()
    assert len(sizes) > 1
    assert {size % 32 for size in sizes} == {0}


def test_what_has_no_smaller_size_is_told_none() -> None:
    for work in (Workload(height=1, width=1), Workload(height=8, width=8)):
        needed = demand(work)
        assert unlocks(needed, budget(needed.vram_reserved_bytes - 1), SPEC, work, None) == ["1 B more VRAM"]


def test_a_picture_cannot_shrink_away_weights() -> None:
    ways = unlocks(demand(), budget(SPEC.weight_bytes - GIB), SPEC, WORK, card())
    assert [way for way in ways if " x " in way] == []


def test_ram_is_named_beside_vram() -> None:
    light = replace(demand(), ram_bytes=9 * GIB)
    assert unlocks(light, budget(80 * GIB, 8 * GIB), SPEC, WORK, card()) == ["1.00 GiB more RAM"]
    (way,) = unlocks(light, budget(SPEC.weight_bytes - GIB, 8 * GIB), SPEC, WORK, card())
    assert way.endswith("more VRAM and 1.00 GiB more RAM")


@given(st.integers(1, 60 * GIB))
def test_any_shortage_has_a_way_out(limit: int) -> None:
    ways = unlocks(demand(), budget(limit), SPEC, WORK, card())
    assert bool(ways) == (demand().vram_reserved_bytes > limit)
