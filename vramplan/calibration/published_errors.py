"""Errors of projected peaks and times against published measurements, bundled with the package."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from vramplan.hardware.rates import RatesBasis, Uncertainty
from vramplan.hardware.types import Accelerator
from vramplan.planner.residuals import KIND_NAMES, Basis, ProjectionError, Residual, error_of, upper_bound

# The share of times to lie in the range that a plan states: as forecasts are usually given.
TIME_COVERAGE = 0.8
_COMPUTED = {"products", "attention"}  # of `Rates.measured`


def bundled_error(basis: Basis, kinds: Collection[str] = ()) -> ProjectionError:
    """The error bound from published measurements (`profiles/residuals.json`, made by benchmarks/accuracy.py).

    It is the widest of those for the kinds of the call. A kind with too few measurements is taken to be as little known
    as the least known of the others.
    """
    errors = _errors("simulated" if basis == "measured" else basis)
    widest = max(errors.values(), key=_width)
    found = [errors[""]]
    for kind, name in KIND_NAMES.items():
        if kind in kinds:
            reason = f"{widest.reason}; too few are of {name}, taken to be as little known"
            found.append(errors.get(kind) or replace(widest, reason=reason))
    return max(found, key=_width)


def _width(error: ProjectionError) -> tuple[float, int]:
    return error.share, error.least_bytes


@cache
def _errors(basis: Basis) -> Mapping[str, ProjectionError]:
    """The error by kind of call, where there are enough measurements; "" is for calls of no other kind.

    Quantized weights count for themselves only. For a kind those count that nothing was fitted on.
    """
    rows = [row for row in _content("residuals.json")["projections"] if row["basis"] == basis]
    plain = error_of([_residual(row) for row in rows if row["kind"] != "quantized"], basis, "published measurements")
    assert plain is not None, f"too few published measurements of {basis} peaks"
    found = {"": plain}
    for kind, name in KIND_NAMES.items():
        own = [_residual(row) for row in rows if row["kind"] == kind and not row["fitted"]]
        error = error_of(own, basis, f"published measurements of {name}")
        found |= {} if error is None else {kind: error}
    return found


def _residual(row: Mapping[str, Any]) -> Residual:
    return Residual(projected_bytes=row["projected_bytes"], measured_bytes=row["measured_bytes"])


def with_published_uncertainty(accelerator: Accelerator) -> Accelerator:
    """The accelerator with the uncertainty of its rates; unchanged without rates.

    It comes from `profiles/time_errors.json`, made by benchmarks/time_errors.py. Computing counts as measured where
    products or attention were and the architecture's shares are not assumed, moving where copies of pageable memory
    were.
    """
    rates = accelerator.rates
    if rates is None:
        return accelerator
    computed: RatesBasis = rates.basis
    if computed == "fitted" and _COMPUTED.intersection(rates.measured):
        computed = "measured"
    moved: RatesBasis = "fitted" if rates.pageable_bytes_per_s is None else "measured"
    return replace(accelerator, rates=replace(rates, uncertainty=published_uncertainty(computed, moved)))


def published_uncertainty(computed: RatesBasis, moved: RatesBasis) -> Uncertainty:
    """The uncertainty of rates of these bases: that of products, and that of copies."""
    computing, moving = _time_errors()["computing", computed], _time_errors()["moving", moved]
    reason = (
        f"{TIME_COVERAGE:.0%} of published timings were within these factors: {len(computing)} of computing, "
        f"{computed}, and {len(moving)} of weights that move, {moved}"
    )
    return Uncertainty(computing=_factor(computing), moving=_factor(moving), reason=reason)


def _factor(errors: Sequence[float]) -> float:
    bound = upper_bound(errors, TIME_COVERAGE)
    assert bound is not None, "too few published timings"
    return float(f"{bound:.3g}")


@cache
def _time_errors() -> Mapping[tuple[str, RatesBasis], Sequence[float]]:
    """By what factors predictions were off, by what was timed and what the rates rested on."""
    found: dict[Any, list[float]] = {}
    for row in _content("time_errors.json")["timings"]:
        ratio = row["predicted"] / row["published"]
        found.setdefault((row["term"], row["basis"]), []).append(max(ratio, 1 / ratio))
    return found


def _content(name: str) -> Any:
    from vramplan.profiles.files import bundled_directory

    return json.loads((bundled_directory() / name).read_text(encoding="utf-8"))
