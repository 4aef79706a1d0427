"""Cache simulations on disk. A stale or damaged entry is computed again, never used and never an error."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from vramplan.common.files import cache_folder, write_text
from vramplan.errors import VramplanError
from vramplan.simulator.types import Simulation

# The imports of the package's own modules, wherever they stand in a file: the style has no other form of them.
_IMPORT = re.compile(r"^ *from (vramplan[\w.]*) import (?:\(([^)]*)\)|(.*))$", re.MULTILINE)


def cached(key: Any, make: Callable[[], Simulation]) -> Simulation:
    """Return the simulation cached under this key, or make it and cache it.

    `key` is any JSON value; the versions of the libraries that decide the outcome are added to it.
    `VRAMPLAN_CACHE` names another folder; `0` turns the cache off.
    """
    folder = cache_folder()
    if folder is None:
        return make()
    path = folder / f"{_digest(key)}.json"
    found = _read(path)
    if found is None:
        found = make()
        _write(path, found)
    return found


@cache
def _code() -> str:
    """The digest of the code that simulates, so that a change of it is a change of version."""
    found = hashlib.sha256()
    for path in simulating_files(Path(__file__).parent.parent):
        found.update(path.read_bytes())
    return found.hexdigest()


def simulating_files(package: Path) -> list[Path]:
    """The package's files that a simulation imports, wherever in a file the import stands; read, and not executed."""
    files = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: set[str] = set()
    waiting = ["vramplan.simulator.model"]
    while waiting:
        name = waiting.pop()
        if name in found or name not in files:
            continue
        found.add(name)
        for module, several, one in _IMPORT.findall(files[name].read_text(encoding="utf-8")):
            names = (f"{module}.{part}" for part in re.findall(r"\w+", several or one))
            waiting += {inner if inner in files else module for inner in names}
    return [files[name] for name in sorted(found)]


def _digest(key: Any) -> str:
    from importlib.metadata import version

    versions = [_code(), *(version(name) for name in ("torch", "diffusers", "transformers", "accelerate"))]
    return hashlib.sha256(json.dumps([versions, key], sort_keys=True, default=str).encode()).hexdigest()[:32]


def _read(path: Path) -> Simulation | None:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Simulation).validate_json(path.read_bytes(), strict=True)
    except (OSError, ValidationError, ValueError):
        return None


def _write(path: Path, simulation: Simulation) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(simulation)))
    except (OSError, VramplanError):
        pass  # with a full disk or a read-only folder the next run takes a few seconds longer
