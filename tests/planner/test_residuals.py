"""The margin comes from measurements: the bound holds as often as it says, and the bundled one from published rows."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.calibration.published_errors import bundled_error
from vramplan.planner.residuals import (
    COVERAGE,
    KIND_NAMES,
    ProjectionError,
    Residual,
    call_kinds,
    error_of,
    needed,
    raised,
    upper_bound,
)
from vramplan.profiles.files import bundled_directory
from vramplan.units import GIB, MIB
from vramplan.workload import Workload

ROWS = json.loads((bundled_directory() / "residuals.json").read_text(encoding="utf-8"))["projections"]


def residual(projected: int, share: float) -> Residual:
    return Residual(projected_bytes=projected, measured_bytes=int(projected * (1 + share)))


@pytest.mark.parametrize(("count", "place"), [(8, None), (9, 9), (18, 18), (19, 18), (20, 19), (99, 90)])
def test_the_bound_is_the_order_statistic_of_the_method(count: int, place: int | None) -> None:
    values = list(range(1, count + 1))
    random.Random(0).shuffle(values)
    assert upper_bound(values) == place
    assert (count >= needed()) == (place is not None)


@pytest.mark.parametrize("count", [9, 13, 20, 40])
def test_the_next_value_is_within_the_bound_as_often_as_promised(count: int) -> None:
    """Whatever the distribution: here one with a heavy tail. 4000 draws have a standard error below 0.5 %."""
    draw = random.Random(count)
    within = 0
    for _ in range(4000):
        values = [draw.paretovariate(1.1) for _ in range(count + 1)]
        bound = upper_bound(values[:-1])
        assert bound is not None
        within += values[-1] <= bound
    assert within / 4000 >= COVERAGE - 0.015


@given(st.integers(1, 200 * GIB), st.floats(0, 3), st.integers(0, GIB), st.data())
def test_a_projection_within_the_rest_is_within_all_of_it(usable: int, share: float, least: int, data) -> None:
    error = ProjectionError(share=share, least_bytes=least, reason="")
    rest = usable - error.margin_bytes(usable)
    if rest <= 0:
        return
    projected = data.draw(st.integers(1, rest))
    assert projected * (1 + share) <= usable * (1 + 1e-12) + 1
    assert projected + least <= usable


@given(st.lists(st.integers(0, 1 << 40), min_size=2, max_size=2), st.floats(0, 3), st.integers(0, GIB))
def test_more_memory_never_leaves_less(sizes: list[int], share: float, least: int) -> None:
    error = ProjectionError(share=share, least_bytes=least, reason="")
    less, more = sorted(sizes)
    assert less - error.margin_bytes(less) <= more - error.margin_bytes(more)


def test_nothing_is_kept_where_projections_were_never_too_low() -> None:
    error = error_of([residual(GIB * (n + 1), -0.02) for n in range(9)], "simulated", "published measurements")
    assert error is not None
    assert (error.share, error.least_bytes) == (0.0, 0)
    assert error.reason == "simulated peaks were never too low in all 9 published measurements"


def test_few_measurements_can_only_raise_the_bound() -> None:
    error = ProjectionError(share=0.01, least_bytes=100 * MIB, reason="published")
    assert raised(error, [], "simulated", "measurements here") is error
    assert raised(error, [residual(GIB, 0.005)], "simulated", "measurements here") is error
    worse = raised(error, [residual(GIB, -0.2), residual(10 * GIB, 0.08)], "simulated", "measurements here")
    assert worse.share == pytest.approx(0.08)
    assert worse.least_bytes == pytest.approx(0.8 * GIB, rel=1e-6)
    assert "8.0%" in worse.reason
    assert "all 2 measurements here" in worse.reason


@pytest.mark.parametrize("basis", ["simulated", "derived", "assumed"])
def test_the_bundled_bound_covers_its_share_of_the_published_rows(basis) -> None:
    error = bundled_error(basis)
    rows = [row for row in ROWS if row["basis"] == basis and row["kind"] != "quantized"]
    bound = [row["projected_bytes"] * (1 + error.share) + 1 for row in rows]
    within = sum(row["measured_bytes"] <= limit for row, limit in zip(rows, bound, strict=True))
    assert within / len(rows) >= COVERAGE
    assert f"of {len(rows)} published" in error.reason or f"all {len(rows)} published" in error.reason
    assert error.reason.startswith(basis)


@pytest.mark.parametrize("basis", ["simulated", "derived", "assumed"])
def test_a_kind_of_call_that_is_less_well_known_has_a_wider_bound(basis) -> None:
    plain = bundled_error(basis)
    for kind, name in KIND_NAMES.items():
        own = [row for row in ROWS if (row["basis"], row["kind"]) == (basis, kind) and not row["fitted"]]
        error = bundled_error(basis, [kind])
        assert error.share >= plain.share
        if len(own) >= needed() and error != plain:
            assert f"published measurements of {name}" in error.reason
            assert sum(item["measured_bytes"] <= item["projected_bytes"] * (1 + error.share) + 1 for item in own) >= (
                COVERAGE * len(own)
            )
        elif error != plain:
            assert f"too few are of {name}" in error.reason


def test_simulated_peaks_of_quantized_weights_have_rows_of_their_own() -> None:
    quantized = bundled_error("simulated", ["quantized"])
    assert quantized.share > bundled_error("simulated").share
    assert quantized.reason.endswith("published measurements of quantized weights")
    for kinds in (["several"], ["sound"], ["several", "quantized"]):
        assert bundled_error("simulated", kinds).share == quantized.share


def test_kinds_of_a_call() -> None:
    plain = Workload(height=64, width=64)
    assert call_kinds(plain, quantized=False) == ()
    assert call_kinds(replace(plain, num_images_per_prompt=2), quantized=True) == ("quantized", "several")
    assert call_kinds(Workload(height=1, width=1), quantized=False) == ("sound",)


def test_every_row_is_of_the_published_table_and_has_its_source() -> None:
    import yaml

    table = bundled_directory().parent / "benchmarks" / "published_peaks.yaml"
    published = {row["id"]: row for row in yaml.safe_load(table.read_text(encoding="utf-8"))["rows"]}
    simulated = {row["row"] for row in ROWS if row["basis"] == "simulated"}
    assert simulated == {name for name, row in published.items() if row.get("margin", not row.get("fitted"))}
    for row in ROWS:
        assert row["measured_bytes"] == round(published[row["row"]]["gib"] * GIB)
        assert row["source"] == published[row["row"]]["source"]


def test_simulated_prices_need_less_than_the_round_factor_they_replaced() -> None:
    """6 %, at least 512 MiB, was kept before: idle memory on a large card."""
    error = bundled_error("simulated")
    for size in (8, 12, 16, 24, 48, 80):
        assert error.margin_bytes(size * GIB) < max(0.06 * size * GIB, 512 * MIB)
