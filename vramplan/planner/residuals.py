"""Bound how far projections of a kind are too low, from measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from vramplan.units import format_bytes
from vramplan.workload import Workload

Basis = Literal["measured", "simulated", "derived", "assumed"]
# Kinds of call whose projections are less well known than those of one picture or video with the weights as stored.
CallKind = Literal["quantized", "several", "sound"]
KIND_NAMES: dict[CallKind, str] = {
    "quantized": "quantized weights",
    "several": "several pictures at once",
    "sound": "sound",
}
# The share of calls to stay below the bound. A call above it is retried with a smaller plan (recover.py), so a higher
# share would cost more memory than it saves time; and nine in ten need only nine measurements.
COVERAGE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """A projected and a measured peak, in bytes."""

    projected_bytes: int
    measured_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionError:
    """The bound on a projection that is too low: a share of it, and a least number of bytes; with the reason."""

    share: float
    least_bytes: int
    reason: str

    def margin_bytes(self, usable_bytes: int) -> int:
        """Return the part of the memory to keep free, so that a projection within the rest still fits if it is too low
        by `share` or `least_bytes`."""
        return max(self.least_bytes, usable_bytes - int(usable_bytes / (1 + self.share)))


def call_kinds(workload: Workload, *, quantized: bool) -> tuple[CallKind, ...]:
    """Return the kinds that a call is of."""
    several = workload.num_images_per_prompt > 1
    found: dict[CallKind, bool] = {"quantized": quantized, "several": several, "sound": workload.sound}
    return tuple(kind for kind, present in found.items() if present)


def needed(coverage: float = COVERAGE) -> int:
    """Return the number of measurements that a bound needs."""
    return ceil(coverage / (1 - coverage) - 1e-9)


def upper_bound(values: Sequence[float], coverage: float = COVERAGE) -> float | None:
    """Return the bound that the next value of the same kind stays below with this probability; None with too few.

    The k-th smallest of n, k = ceil((n + 1) x coverage): exact for exchangeable values of any distribution and any n
    (split conformal prediction; Lei et al., JASA 113, 2018, lemma 2; Angelopoulos and Bates, arXiv 2107.07511).
    """
    place = ceil((len(values) + 1) * coverage - 1e-9)
    return sorted(values)[place - 1] if 0 < place <= len(values) else None


def error_of(residuals: Sequence[Residual], basis: Basis, measurements: str) -> ProjectionError | None:
    """Return the bound from these measurements; None with too few.

    The bound in bytes covers projections too small for a share.
    """
    share = upper_bound([_share(item) for item in residuals])
    size = upper_bound([item.measured_bytes - item.projected_bytes for item in residuals])
    if share is None or size is None:
        return None
    return _error_with_reason(residuals, basis, measurements, max(0.0, share), max(0, int(size)))


def raised(error: ProjectionError, residuals: Sequence[Residual], basis: Basis, measurements: str) -> ProjectionError:
    """Raise the bound to the worst of these measurements, which are too few for a bound of their own."""
    share = max(map(_share, residuals), default=0.0)
    size = max((item.measured_bytes - item.projected_bytes for item in residuals), default=0)
    if share <= error.share:
        return error
    return _error_with_reason(residuals, basis, measurements, share, max(error.least_bytes, size))


def _error_with_reason(
    residuals: Sequence[Residual], basis: str, measurements: str, share: float, size: int
) -> ProjectionError:
    within = sum(
        item.measured_bytes <= max(item.projected_bytes * (1 + share) + 1, item.projected_bytes + size)
        for item in residuals
    )
    of_all = f"all {within}" if within == len(residuals) else f"{within} of {len(residuals)}"
    low = f"at most {share:.1%} or {format_bytes(size)} too low" if share or size else "never too low"
    reason = f"{basis} peaks were {low} in {of_all} {measurements}"
    return ProjectionError(share=share, least_bytes=size, reason=reason)


def _share(item: Residual) -> float:
    return item.measured_bytes / item.projected_bytes - 1
