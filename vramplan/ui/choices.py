"""The choices on the page, and the check of a selection: nothing outside the given folder is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

from vramplan.errors import UsageError
from vramplan.hardware.detect import detect
from vramplan.profiles.catalogue import device_profiles, pipeline_names
from vramplan.strategies.base import Quality
from vramplan.units import GIB, format_bytes

LOCAL = "here"
_FOLDER, _PROFILE = "folder:", "profile:"
_MOST_DEPTH = 4  # levels of folders searched for pipelines
COUNTS = ("width", "height", "frames", "batch", "steps")
AMOUNTS = ("vram", "ram")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A checked selection. `model` is a profile's name or a folder that may be read; `device` is None for this
    machine; `counts` and `amounts` hold the fields that were filled in, amounts as text in GiB."""

    model: str
    device: str | None
    allow: Quality | None
    counts: tuple[tuple[str, int], ...] = ()
    amounts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The lists on the page: values with their labels. `folder` has the pipelines, if any."""

    folder: Path | None
    models: Mapping[str, str]
    devices: Mapping[str, str]
    ram: str
    accelerated: bool


def find_choices(folder: Path | None) -> Choices:
    """Find the profiles, the pipelines in the folder, the device profiles and this machine, as they are now."""
    root = None if folder is None else folder.resolve()
    names = [] if root is None else [str(path.relative_to(root)) for path in _pipelines(root)]
    folders = {f"{_FOLDER}{name}": f"{name} (folder)" for name in names}
    hardware = detect()
    card = next(iter(hardware.accelerators), None)
    return Choices(
        folder=root,
        models=folders | {f"{_PROFILE}{name}": name for name in pipeline_names()},
        devices={LOCAL: f"this machine: {card.name if card else 'the CPU'}"} | _devices(),
        ram=f"{hardware.host.available_bytes / GIB:.1f}",
        accelerated=card is not None,
    )


@cache
def _devices() -> dict[str, str]:
    """The device profiles with their labels, read once: there are many."""
    return {profile.name: f"{profile.title}, {format_bytes(profile.memory_bytes)}" for profile in device_profiles()}


def check_selection(choices: Choices, *, model: Any, device: Any, allow: Any, **numbers: Any) -> Selection:
    """Check the values from the page against its choices.

    `numbers` are counts and amounts by name, None for an empty field.

    Raises:
        UsageError: not a choice of the page, not a number, or a folder with links out of the given one.
    """
    if model not in choices.models or device not in choices.devices or allow not in (None, *get_args(Quality)):
        raise UsageError("choose a model, a card and a quality from the lists")
    for name, value in numbers.items():
        kind = int if name in COUNTS else int | float
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind) or not value > 0):
            raise UsageError(f"{name} must be a {'whole ' if kind is int else ''}number above 0")
    root = choices.folder if model.startswith(_FOLDER) else None
    return Selection(
        model=model.removeprefix(_PROFILE) if root is None else _safe_folder(root, model),
        device=None if device == LOCAL else device,
        allow=allow,
        counts=tuple((name, numbers[name]) for name in COUNTS if numbers.get(name)),
        amounts=tuple((name, f"{numbers[name]}GiB") for name in AMOUNTS if numbers.get(name)),
    )


def _safe_folder(root: Path, model: str) -> str:
    """The folder's path, with links resolved. Raises UsageError if it or anything in it leads out of `root`."""
    folder = (root / model.removeprefix(_FOLDER)).resolve()
    outside = [path for path in (folder, *folder.rglob("*")) if not path.resolve().is_relative_to(root)]
    if outside:
        raise UsageError(f"{outside[0]} leads out of {root}, and nothing outside it is read")
    return str(folder)


def _pipelines(root: Path, depth: int = 0) -> Iterator[Path]:
    """The folders with a saved pipeline, without following links."""
    if (root / "model_index.json").is_file():
        yield root
    elif depth < _MOST_DEPTH:
        try:
            inner = sorted(entry.path for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False))
        except OSError:  # not readable, or deleted
            return
        for path in inner:
            if not os.path.basename(path).startswith("."):
                yield from _pipelines(Path(path), depth + 1)
