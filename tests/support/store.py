"""A store of measurements for each test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the store, which does not exist yet: for every test of a module that imports this."""
    monkeypatch.setenv("VRAMPLAN_CALIBRATION", str(tmp_path / "store"))
    return tmp_path / "store"
