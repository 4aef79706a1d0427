"""Profile files: the bundled and the user's folders, and the mistakes in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from vramplan.errors import VramplanError

ProfileKind = Literal["pipelines", "devices"]
T = TypeVar("T")
# The path of keys and positions to a value in the file, and the message.
Mistake = tuple[Sequence[int | str], str]
# More than the number of bundled files.
_CACHE_ENTRIES = 1024


def user_directory() -> Path:
    """The folder of the user's `devices/NAME.yaml` and `pipelines/NAME.yaml`; it need not exist.

    The environment variable VRAMPLAN_PROFILES overrides it.
    """
    from platformdirs import user_config_path

    return Path(os.environ.get("VRAMPLAN_PROFILES") or user_config_path("vramplan") / "profiles")


def bundled_directory() -> Path:
    """The folder of the profiles bundled with vramplan.

    Raises:
        VramplanError: the installation lacks it.
    """
    here = Path(__file__).resolve().parent
    # A wheel has the profiles inside the package; a checkout has them at its root.
    for directory in (here / "_bundled", here.parents[1] / "profiles"):
        if directory.is_dir():
            return directory
    raise VramplanError(f"the bundled profiles are missing from {here}: install vramplan again")


def profile_files(kind: ProfileKind) -> dict[str, Path]:
    """The files by name: the user's, then the bundled ones without a user's file of the same name."""
    own = {path.stem: path for path in _yaml_files(user_directory() / kind)}
    taken = {name.casefold() for name in own}
    bundled = {path.stem: path for path in _yaml_files(bundled_directory() / kind)}
    return own | {name: path for name, path in bundled.items() if name.casefold() not in taken}


def is_user_file(path: Path) -> bool:
    """Whether the file is the user's, not a bundled one."""
    return path.is_relative_to(user_directory())


def contains_text(path: Path, text: str) -> bool:
    """Whether the file contains the casefolded text, in any case: cheaper than parsing it."""
    try:
        return text in _casefolded_text(*_version(path))
    except OSError:  # reported when the file itself is loaded
        return False


@lru_cache(maxsize=_CACHE_ENTRIES)
def _casefolded_text(path: Path, modified: int, size: int) -> str:
    return path.read_text(encoding="utf-8", errors="replace").casefold()


def _version(path: Path) -> tuple[Path, int, int]:
    """The path, modification time in ns and size: the cache key of a file's content."""
    about = path.stat()
    return path, about.st_mtime_ns, about.st_size


def read_profile(path: Path, profile_type: type[T]) -> T:
    """Read the file as `profile_type`; an unchanged file is read once.

    Raises:
        VramplanError: it cannot be read or does not hold one; the message names the file and the place in it.
    """
    wanted: Any = profile_type
    try:
        found: T = _read(*_version(path), wanted)
    except OSError as error:
        raise VramplanError(f"{path} cannot be read: {error.strerror}") from None
    return found


@lru_cache(maxsize=_CACHE_ENTRIES)
def _read(path: Path, modified: int, size: int, profile_type: type[Any]) -> Any:
    found, errors = _validate(read_document(path), profile_type)
    if errors:
        raise VramplanError(f"{path}: {_mistake_text(*errors[0])}; correct the file")
    return found


def mistakes(path: Path, profile_type: type[Any]) -> tuple[str, ...]:
    """The mistakes in the file, one line each, as `mistake_lines` formats them; empty if it can be used."""
    try:
        _, errors = _validate(read_document(path), profile_type)
    except VramplanError as error:
        return (str(error),)
    return mistake_lines(path, errors)


def mistake_lines(path: Path, found: Iterable[Mistake]) -> tuple[str, ...]:
    """Format mistakes in a file, one line each: `FILE:LINE: place: message`."""
    import yaml

    found = list(found)
    root = yaml.compose(path.read_bytes()) if found else None
    return tuple(f"{path}:{_line(root, place)}: {_mistake_text(place, text)}" for place, text in found)


def read_document(path: Path) -> Any:
    """Parse the file into plain values: mappings, lists, texts, numbers.

    Raises:
        VramplanError: it cannot be read, is not YAML, or holds other values.
    """
    import yaml

    try:
        # The C loader, if PyYAML was built with it, takes a tenth of the time.
        document = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        json.dumps(document)
    except OSError as error:
        raise VramplanError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise VramplanError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except TypeError as error:
        raise VramplanError(f"{path} holds more than plain values: {error}") from None
    return document


def _yaml_files(folder: Path) -> Iterable[Path]:
    """The folder's YAML files, sorted by name; empty if there is no folder."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(".yaml") and entry.is_file())
    except OSError:
        return []
    return [folder / name for name in names]


def _validate(document: Any, profile_type: type[T]) -> tuple[T | None, Sequence[Mistake]]:
    """The profile, or the mistakes in it."""
    from pydantic import TypeAdapter, ValidationError

    try:
        # Through JSON, strict validation accepts a list for a tuple and a mapping for a dataclass, nothing more.
        return TypeAdapter(profile_type).validate_json(json.dumps(document), strict=True), ()
    except ValidationError as error:
        return None, [(item["loc"], item["msg"].removeprefix("Value error, ")) for item in error.errors()]


def _mistake_text(place: Iterable[int | str], text: str) -> str:
    return f"{'.'.join(map(str, place)) or 'the whole document'}: {text}"


def _line(node: Any, place: Iterable[int | str]) -> int:
    """The line on which a place in a YAML document starts, following the path as far as it exists."""
    line = 0
    for step in place:
        found = dict(_entries(node)).get(step)
        if found is None:
            break
        line, node = found
    return line + 1


def _entries(node: Any) -> Iterator[tuple[int | str, tuple[int, Any]]]:
    """The items of a mapping or a sequence, by key or position: the line each starts on, and its node."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        yield from ((key.value, (key.start_mark.line, value)) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from ((position, (item.start_mark.line, item)) for position, item in enumerate(node.value))
