"""One simulated model of each small pipeline: what one simulation recorded serves the next, as in planning."""

from __future__ import annotations

from functools import cache

from make_pipeline import build

from vramplan.pipeline.describe import describe
from vramplan.simulator.model import SimulatedModel


@cache
def small_model(kind: str) -> SimulatedModel:
    """The model of a live pipeline of this kind. Made once: to be read only."""
    return SimulatedModel(describe(build(kind)).spec)
