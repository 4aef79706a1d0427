"""Each test has a store of its own."""

from __future__ import annotations

from tests.support.store import own_store

__all__ = ["own_store"]
