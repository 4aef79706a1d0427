"""The terms of the cost model of time, each on a made-up machine."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

import vramplan
from tests.support.specs import RATES, UNSURE
from vramplan.hardware.rates import ARCHITECTURES, Rates, architecture, slower
from vramplan.planner import times
from vramplan.planner.footprint import Work
from vramplan.strategies.base import Hold

WORK = Work(flops={"product float16": 60e12}, traffic_bytes=500e9, launches=1000, forwards=1)


def work(kind: str) -> Work:
    return replace(WORK, flops={kind: 60e12})


def hold(**changes: object) -> Hold:
    return Hold(running_bytes=1, **changes)  # type: ignore[arg-type]


def test_products_take_the_share_of_the_peak_that_is_reached() -> None:
    assert times.products(WORK, RATES) == pytest.approx(1.0)
    assert times.products(WORK, replace(RATES, reached=0.3)) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("convolution float16", 0.67),
        ("wide_attention bfloat16", 1.6),
        ("attention float16", 0.8),
        ("product float32", 0.25),
        ("convolution float32", 0.67 * 0.5),
        ("product bfloat16", 1.0),
    ],
)
def test_each_kind_and_dtype_has_its_own_rate(kind: str, share: float) -> None:
    assert times.products(work(kind), RATES) == pytest.approx(1 / share)


def test_kinds_add_up() -> None:
    both = replace(WORK, flops={"product float16": 60e12, "convolution float16": 67e12 * 0.6})
    assert times.products(both, RATES) == pytest.approx(2.0)


def test_bfloat16_is_not_priced_at_the_rate_of_float16_where_the_card_has_none() -> None:
    old = replace(RATES, bfloat16_share=0.125)
    assert times.products(work("product bfloat16"), old) == pytest.approx(8 * times.products(WORK, old))


def test_traffic_and_launches() -> None:
    assert times.traffic(WORK, RATES) == pytest.approx(1 / 0.815)
    assert times.launches(WORK, replace(RATES, launch_seconds=1e-3)) == pytest.approx(1.0)


def test_copies_to_the_device_by_kind_of_memory() -> None:
    pinned, streamed = hold(), hold(overlapped=True)
    assert times.copies_in(pinned, 20 * 10**9, RATES) == pytest.approx(1.0)
    assert times.copies_in(streamed, 20 * 10**9, RATES) == pytest.approx(1 / RATES.stream_share)
    assert times.copies_in(hold(pageable=True), 10 * 10**9, RATES) == pytest.approx(1.0)
    assert times.copies_in(hold(pageable=True), 10**9, replace(RATES, pageable_bytes_per_s=1e9)) == pytest.approx(1.0)
    assert times.copies_in(hold(rate=0.5), 10 * 10**9, RATES) == pytest.approx(1.0)


def test_pageable_memory_does_not_get_faster_with_any_link() -> None:
    fast = replace(RATES, link_bytes_per_s=200e9)
    assert fast.from_pageable_bytes_per_s == 12e9


def test_only_what_is_in_pageable_memory_is_copied_back() -> None:
    assert times.copies_back(hold(pageable=True), 1_200_000_000, RATES) == pytest.approx(1.0)
    assert times.copies_back(hold(), 10**12, RATES) == 0.0


def test_what_is_outside_of_streamed_groups_goes_both_ways() -> None:
    one_way = times.copies_in(hold(pageable=True), 10**9, RATES) + times.copies_back(hold(pageable=True), 10**9, RATES)
    assert times.copies_around(2 * 10**9, RATES) == pytest.approx(one_way)


def test_files_and_hooks() -> None:
    assert times.file_reads(2 * 10**9, RATES) == pytest.approx(1.0)
    assert times.hooks(hold(pauses=10), 2, RATES) == pytest.approx(20 * RATES.pause_seconds)
    assert times.hooks(hold(leaf_hooks=10), 2, RATES) == pytest.approx(20 * RATES.leaf_seconds)


def test_what_is_hidden_and_what_is_not() -> None:
    assert times.together(2.0, 1.0, hold()) == 3.0
    assert times.together(2.0, 1.0, hold(overlapped=True, unhidden=0.5)) == 2.5
    assert times.together(1.0, 2.0, hold(overlapped=True, unhidden=0.0)) == 2.0


@pytest.mark.parametrize(
    ("name", "worse"),
    [
        ("memory_bytes_per_s", 0.5), ("half_flops_per_s", 0.5), ("reached", 0.5), ("launch_seconds", 2),
        ("leaf_seconds", 2), ("back_bytes_per_s", 0.5), ("link_bytes_per_s", 0.5), ("disk_bytes_per_s", 0.5),
        ("pause_seconds", 2), ("memory_share", 0.5),
    ],
)  # fmt: skip
def test_a_slower_machine_takes_longer(name: str, worse: float) -> None:
    moving = hold(pageable=True, moved_in_bytes=10**9, moved_out_bytes=10**9, disk_bytes=10**9, pauses=3, leaf_hooks=3)

    def total(rates: Rates) -> float:
        compute = times.products(WORK, rates) + times.traffic(WORK, rates) + times.launches(WORK, rates)
        return compute + times.moving(moving, 1, rates) + times.hooks(moving, 1, rates)

    assert total(replace(RATES, **{name: getattr(RATES, name) * worse})) > total(RATES)


def test_each_constant_is_used_in_one_place() -> None:
    """In the cost model or in the rates themselves, so that no term is charged twice."""
    package = Path(vramplan.__file__).parent
    text = "".join((package / name).read_text(encoding="utf-8") for name in ("planner/times.py", "planner/clock.py"))
    shares = {"convolution_share", "attention_share", "wide_attention_share"}  # by the name of the kind
    properties = {"pageable_bytes_per_s", "half_flops_per_s", "reached", "float32_share", "tf32_share"}
    others = {"source", "measured", "bfloat16_share", "basis", "uncertainty"}
    for name in {item.name for item in fields(Rates)} - shares - properties - others:
        uses = text.count(f"rates.{name}") + text.count(f"RATES.{name}")
        assert uses == (2 if name == "back_bytes_per_s" else 1), name


def test_architectures_are_in_order_and_cover_every_card() -> None:
    assert [item.since for item in ARCHITECTURES] == sorted(item.since for item in ARCHITECTURES)
    found = [architecture(capability) for capability in (3.7, 6.1, 7.0, 7.5, 8.0, 8.6, 8.9, 9.0, 10.0, 12.0)]
    assert [item.reached for item in found if item] == [0.87, 0.87, 0.45, 0.45, 0.53, 0.77, 0.84, 0.40, 0.40, 0.84]
    assert architecture(None) is None


@pytest.mark.parametrize(
    ("term", "longer"),
    [
        ("computing", {}),
        ("pinned", {"moved_in_bytes": 20 * 10**9}),
        ("pageable", {"moved_in_bytes": 10 * 10**9, "pageable": True}),
        ("pageable", {"moved_out_bytes": 12 * 10**8, "pageable": True}),
        ("files", {"disk_bytes": 2 * 10**9}),
        ("hooks", {"leaf_hooks": 1250}),
    ],
)
def test_each_term_is_slower_by_itself(term: str, longer: dict[str, object]) -> None:
    """Each of these holds takes a second, and three where its own term is the slower one; computing is a factor."""
    assert slower(UNSURE)["computing"] == (1.5, UNSURE)
    for name, (factor, rates) in slower(UNSURE).items():
        if longer:
            seconds = times.moving(hold(**longer), 1, rates) + times.hooks(hold(**longer), 1, rates)
            assert seconds == pytest.approx(3.0 if name == term else 1.0)
            assert (factor != 1) == (name == "computing")
    assert not slower(RATES)


def test_a_range_is_as_wide_as_its_only_term_and_wider_with_two() -> None:
    assert times.seconds_range(10, [15, 10]) == pytest.approx((10 / 1.5, 15))
    low, high = times.seconds_range(10, [15, 15]) or (0, 0)
    assert low < 10 / 1.5
    assert 15 < high < 22.5
    assert times.seconds_range(10, []) is None
    assert times.seconds_range(0, [0, 0]) is None
