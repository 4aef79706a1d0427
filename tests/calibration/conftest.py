from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def folder(calibration_folder: Path) -> Path:
    """A store of its own for every test."""
    return calibration_folder
