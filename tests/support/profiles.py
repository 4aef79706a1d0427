"""The specs of bundled profiles, each made once for all processes of a test run."""

from __future__ import annotations

import os
import pickle
from functools import cache
from pathlib import Path

from vramplan.pipeline.bundled import spec_from_profile
from vramplan.pipeline.types import PipelineSpec
from vramplan.profiles.catalogue import load_pipeline_profile

_FOLDER = Path(os.environ["VRAMPLAN_CACHE"]) / "specs"  # of this run: see conftest.py


@cache
def profile_spec(name: str) -> PipelineSpec:
    """The spec of a bundled profile in its own dtype: building its modules without weights takes up to seconds."""
    file = _FOLDER / f"{name}.pickle"
    if file.exists():
        return pickle.loads(file.read_bytes())  # type: ignore[no-any-return]
    made = spec_from_profile(load_pipeline_profile(name))
    _FOLDER.mkdir(exist_ok=True)
    written = file.with_suffix(f".{os.getpid()}")
    written.write_bytes(pickle.dumps(made))
    written.replace(file)
    return made
