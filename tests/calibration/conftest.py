from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own for every test, not there yet."""
    monkeypatch.setenv("VRAMPLAN_CALIBRATION", str(tmp_path / "store"))
    return tmp_path / "store"
