"""Real modules run on one thread here; tables of streamed weights are small where properties are checked on many."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.one_thread import _one_thread
from vramplan.planner import streaming

__all__ = ["_one_thread"]


@pytest.fixture(scope="module")
def _small_tables() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(streaming, "_MOST", 400)
        yield
