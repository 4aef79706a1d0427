"""The uncertainty of times comes from published rows, and is less where more is known of the machine."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from tests.support.records import CARD
from vramplan.calibration.published_errors import TIME_COVERAGE, with_published_uncertainty
from vramplan.hardware.rates import Rates, RatesBasis, Uncertainty
from vramplan.profiles.files import bundled_directory

ROWS = json.loads((bundled_directory() / "time_errors.json").read_text(encoding="utf-8"))["timings"]
KNOWN = Rates(memory_bytes_per_s=1e12, link_bytes_per_s=25e9, half_flops_per_s=100e12, reached=0.66, source="profile")


def uncertainty(basis: RatesBasis, pageable: float | None = None) -> Uncertainty:
    """With products measured, on a card of a fitted architecture, where the basis is `measured`."""
    known: RatesBasis = "fitted" if basis == "measured" else basis
    measured = () if basis == "fitted" else ("products",)  # which do not help an assumed one
    rates = replace(KNOWN, basis=known, measured=measured, pageable_bytes_per_s=pageable)
    rates = with_published_uncertainty(replace(CARD, rates=rates)).rates
    assert rates is not None
    assert rates.uncertainty is not None
    return rates.uncertainty


def test_the_more_is_known_of_a_machine_the_narrower() -> None:
    assumed, fitted, measured = uncertainty("assumed"), uncertainty("fitted"), uncertainty("measured", 5e9)
    assert 1 < measured.computing < fitted.computing < assumed.computing
    assert 1 < measured.moving < fitted.moving == assumed.moving
    assert "measured" in measured.reason
    assert "fitted" in fitted.reason


@pytest.mark.parametrize("basis", ["measured", "fitted", "assumed"])
def test_the_factor_covers_its_share_of_the_published_rows(basis: RatesBasis) -> None:
    found = uncertainty(basis, 5e9 if basis == "measured" else None)
    for term, factor in (("computing", found.computing), ("moving", found.moving)):
        wanted = "fitted" if (term, basis) == ("moving", "assumed") else basis
        ratios = [row["predicted"] / row["published"] for row in ROWS if (row["term"], row["basis"]) == (term, wanted)]
        within = [ratio for ratio in ratios if 1 / factor * 0.995 <= ratio <= factor * 1.005]  # three digits
        assert len(within) / len(ratios) >= TIME_COVERAGE
        assert f"{len(ratios)} of" in found.reason


def test_without_rates_nothing_is_known() -> None:
    assert with_published_uncertainty(replace(CARD, rates=None)).rates is None


def test_every_row_is_of_the_published_table_and_has_its_source() -> None:
    table = bundled_directory().parent / "benchmarks" / "published_times.yaml"
    published = {row["id"]: row for row in yaml.safe_load(table.read_text(encoding="utf-8"))["rows"]}
    for row in ROWS:
        assert row["source"] == published[row["row"]]["source"]
        if row["term"] == "computing":
            assert row["published"] == pytest.approx(published[row["row"]]["seconds"], rel=1e-3)
            assert published[row["row"]]["strategy"].startswith("resident")
