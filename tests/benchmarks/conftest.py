"""Real modules run on one thread here."""

from __future__ import annotations

from tests.support.one_thread import _one_thread

__all__ = ["_one_thread"]
