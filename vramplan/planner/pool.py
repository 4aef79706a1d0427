"""A pool of candidates: every combination of one placement from each axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product

from vramplan.strategies import Placement

# Placements of one component, or of several that are placed together.
ComponentPlacements = Mapping[str, Placement]


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidatePool:
    """Candidates: every combination of one choice from each axis."""

    axes: tuple[tuple[ComponentPlacements, ...], ...]

    @property
    def placements(self) -> Iterable[ComponentPlacements]:
        """Every combination, the last axis changing fastest."""
        return (self.merge(chosen) for chosen in product(*self.axes))

    @staticmethod
    def merge(chosen: Iterable[ComponentPlacements]) -> dict[str, Placement]:
        """Merge one choice from each axis into one placement."""
        return {name: setting for placed in chosen for name, setting in placed.items()}
