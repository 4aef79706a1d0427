"""Prices of all mixes at once are those that are made one by one."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.planner.test_decide import QUICK, VRAM, WORKS, specs
from tests.support.specs import GIB, UNSURE, budget, card
from vramplan.planner.candidates import rows
from vramplan.planner.demand import Pricer
from vramplan.planner.fixed import Fixed
from vramplan.planner.footprint import AssumedFootprint
from vramplan.planner.order import order, rounded, surely_faster
from vramplan.planner.table import Table

pytestmark = pytest.mark.usefixtures("_small_tables")


@QUICK
@given(specs(), WORKS, VRAM, st.booleans(), st.data())
def test_every_figure_is_the_one_of_the_candidate_priced_alone(spec, work, vram, loaded, data) -> None:
    if loaded:
        parts = [type(c)(**{n: getattr(c, n) for n in c.__slots__} | {"device": "cpu"}) for c in spec.components]
        spec = type(spec)(**{n: getattr(spec, n) for n in spec.__slots__} | {"components": tuple(parts)})
    accelerator = card(vram, rates=UNSURE)
    price = Pricer(spec, work, AssumedFootprint(spec=spec, workload=work), accelerator)
    found = rows(spec, work, Fixed(), accelerator)[0]
    row = data.draw(st.sampled_from(found))
    for pool in row.pools:
        if prod(map(len, pool.axes)) == 1:
            continue
        table = Table(pool, price, row.decode)
        reserved, seconds = table.vram_and_seconds(row.decode)
        longer = dict(zip(price.slower, table.if_slower(row.decode), strict=True))
        every = list(pool.placements)
        assert len(every) == len(reserved) == len(table.ram)
        for place in data.draw(st.lists(st.sampled_from(range(len(every))), min_size=1, max_size=8)):
            demand = price(every[place], row.decode)
            assert reserved[place] == demand.vram_reserved_bytes
            assert table.ram[place] == demand.ram_bytes
            assert table.disk[place] == demand.disk_bytes
            assert seconds[place] == pytest.approx(demand.seconds_per_call, rel=1e-9)
            one = {term: values[place] for term, values in longer.items()}
            assert one == pytest.approx(demand.seconds_if_slower, rel=1e-9)


@QUICK
@given(specs(), WORKS, VRAM, st.integers(1, 64), st.sampled_from(["speed", "memory"]))
def test_the_best_is_the_first_in_order_of_those_that_are_short_by_least(spec, work, vram, ram, prefer) -> None:
    price = Pricer(spec, work, AssumedFootprint(spec=spec, workload=work), card(vram))
    limit = budget(vram, ram * GIB)
    pools = [pool for row in rows(spec, work, Fixed(decode=()), card(vram))[0] for pool in row.pools]
    pool = max(pools, key=lambda pool: prod(map(len, pool.axes)))
    table = Table(pool, price, ())
    reserved, seconds = table.vram_and_seconds(())
    short = np.maximum(reserved - vram, 0) + np.maximum(table.ram - ram * GIB, 0)
    keys = order(
        prefer,
        seconds=seconds,
        quality=table.quality,
        changed=np.zeros(len(short)),
        custom=table.custom,
        offloaded=table.offloaded,
        ram_bytes=table.ram,
        vram_bytes=reserved,
    )
    told = [np.array([rounded(value, digits) for value in values]) for values, digits in keys]
    first = int(np.lexsort((*reversed(told), short))[0])
    assert table.best((), limit, prefer) == list(pool.placements)[first]


@QUICK
@given(specs(), WORKS, VRAM, st.data())
def test_none_that_fits_is_surely_faster_than_the_best(spec, work, vram, data) -> None:
    accelerator = card(vram, rates=UNSURE)
    price = Pricer(spec, work, AssumedFootprint(spec=spec, workload=work), accelerator)
    row = data.draw(st.sampled_from(rows(spec, work, Fixed(), accelerator)[0]))
    pool = data.draw(st.sampled_from(row.pools))
    table = Table(pool, price, row.decode)
    best = price(table.best(row.decode, budget(vram), "speed"), row.decode)
    every = list(pool.placements)
    for place in data.draw(st.lists(st.sampled_from(range(len(every))), min_size=1, max_size=20)):
        other = price(every[place], row.decode)
        if other.vram_reserved_bytes <= vram and other.seconds_per_call * 1.01 < best.seconds_per_call:
            assert not surely_faster(other.seconds_if_slower, best.seconds_if_slower)
