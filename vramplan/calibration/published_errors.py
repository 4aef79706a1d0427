"""Errors of projected peaks against published measurements, bundled with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from vramplan.planner.residuals import Basis, ProjectionError, Residual, error_of


def bundled_error(basis: Basis) -> ProjectionError:
    """The error bound from published measurements (`profiles/residuals.json`, made by benchmarks/accuracy.py)."""
    kind = "simulated" if basis == "measured" else basis
    error = error_of(_bundled()[kind], kind, "published measurements")
    assert error is not None, f"too few published measurements of {kind} peaks"
    return error


@cache
def _bundled() -> Mapping[str, Sequence[Residual]]:
    from vramplan.profiles.files import bundled_directory

    content: Any = json.loads((bundled_directory() / "residuals.json").read_text(encoding="utf-8"))
    found: dict[str, list[Residual]] = {}
    for row in content["projections"]:
        item = Residual(projected_bytes=row["projected_bytes"], measured_bytes=row["measured_bytes"])
        found.setdefault(row["basis"], []).append(item)
    return found
