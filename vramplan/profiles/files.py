"""Files of facts: where the bundled ones and the user's own lie, and what is wrong with one."""

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
# A place in a file, as the keys and positions that lead there, and what is wrong at it.
Mistake = tuple[Sequence[int | str], str]
# More files than come with vramplan.
_KEPT = 1024


def user_directory() -> Path:
    """The folder with the user's own `devices/NAME.yaml` and `pipelines/NAME.yaml`; it need not exist.

    The environment variable VRAMPLAN_PROFILES names another one.
    """
    from platformdirs import user_config_path

    return Path(os.environ.get("VRAMPLAN_PROFILES") or user_config_path("vramplan") / "profiles")


def bundled_directory() -> Path:
    """The folder with the facts that come with vramplan.

    Raises:
        VramplanError: the installation lacks it.
    """
    here = Path(__file__).resolve().parent
    # The wheel carries the facts inside the package; a checkout has them at its top.
    for directory in (here / "_bundled", here.parents[1] / "profiles"):
        if directory.is_dir():
            return directory
    raise VramplanError(f"the bundled profiles are missing from {here}: install vramplan again")


def profile_files(kind: ProfileKind) -> dict[str, Path]:
    """The files by name: the user's first, then the bundled ones that none of the user's stands in for."""
    own = {path.stem: path for path in _yaml_files(user_directory() / kind)}
    taken = {name.casefold() for name in own}
    bundled = {path.stem: path for path in _yaml_files(bundled_directory() / kind)}
    return own | {name: path for name, path in bundled.items() if name.casefold() not in taken}


def is_users(path: Path) -> bool:
    """Whether the file is one of the user's, and not one of the bundled ones."""
    return path.is_relative_to(user_directory())


def mentions(path: Path, text: str) -> bool:
    """Whether the file holds the text anywhere, whatever the case: cheaper to ask than parsing it."""
    try:
        return text in _folded(*_version(path))
    except OSError:  # to be told of when the file itself is asked for
        return False


@lru_cache(maxsize=_KEPT)
def _folded(path: Path, modified: int, size: int) -> str:
    return path.read_text(encoding="utf-8", errors="replace").casefold()


def _version(path: Path) -> tuple[Path, int, int]:
    """What tells a file from what stood in its place before."""
    about = path.stat()
    return path, about.st_mtime_ns, about.st_size


def read_profile(path: Path, profile_type: type[T]) -> T:
    """What the file holds, as `profile_type`; a file that is as it was is read once.

    Raises:
        VramplanError: it holds something else; the message names the file and the place in it.
    """
    wanted: Any = profile_type
    try:
        found: T = _read(*_version(path), wanted)
    except OSError as error:
        raise VramplanError(f"{path} cannot be read: {error.strerror}") from None
    return found


@lru_cache(maxsize=_KEPT)
def _read(path: Path, modified: int, size: int, profile_type: type[Any]) -> Any:
    found, errors = _validated(read_document(path), profile_type)
    if errors:
        raise VramplanError(f"{path}: {_told(*errors[0])}; correct the file")
    return found


def mistakes(path: Path, profile_type: type[Any]) -> tuple[str, ...]:
    """What keeps the file from being used, one line each, as `located` has them. None if nothing does."""
    try:
        _, errors = _validated(read_document(path), profile_type)
    except VramplanError as error:
        return (str(error),)
    return located(path, errors)


def located(path: Path, found: Iterable[Mistake]) -> tuple[str, ...]:
    """What is wrong at places of a file, one line each: `FILE:LINE: place: what is wrong`."""
    import yaml

    found = list(found)
    root = yaml.compose(path.read_bytes()) if found else None
    return tuple(f"{path}:{_line(root, place)}: {_told(place, text)}" for place, text in found)


def read_document(path: Path) -> Any:
    """The file's plain values: mappings, lists, texts, numbers.

    Raises:
        VramplanError: it cannot be read, is not YAML, or holds more than those.
    """
    import yaml

    try:
        # The same loader in C, where PyYAML was built with it: a tenth of the time.
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
    """Sorted by name; none where there is no folder."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(".yaml") and entry.is_file())
    except OSError:
        return []
    return [folder / name for name in names]


def _validated(document: Any, profile_type: type[T]) -> tuple[T | None, Sequence[Mistake]]:
    """The profile, or the mistakes in it."""
    from pydantic import TypeAdapter, ValidationError

    try:
        # Through JSON, strict validation takes a list for a tuple and a mapping for a dataclass: no more.
        return TypeAdapter(profile_type).validate_json(json.dumps(document), strict=True), ()
    except ValidationError as error:
        return None, [(item["loc"], item["msg"].removeprefix("Value error, ")) for item in error.errors()]


def _told(place: Iterable[int | str], text: str) -> str:
    return f"{'.'.join(map(str, place)) or 'the whole document'}: {text}"


def _line(node: Any, place: Iterable[int | str]) -> int:
    """The line that a place in a YAML document starts on, or as much of the place as there is."""
    line = 0
    for step in place:
        found = dict(_entries(node)).get(step)
        if found is None:
            break
        line, node = found
    return line + 1


def _entries(node: Any) -> Iterator[tuple[int | str, tuple[int, Any]]]:
    """What a mapping or a sequence holds, by key or position: the line it starts on and the node."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        yield from ((key.value, (key.start_mark.line, value)) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from ((position, (item.start_mark.line, item)) for position, item in enumerate(node.value))
