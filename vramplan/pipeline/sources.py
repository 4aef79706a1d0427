"""The source of a pipeline as a type: a live object, a folder, the hub, a bundled profile, a single file.

`str(source)` is the text that a plan file keeps; `parse_source` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vramplan.errors import UsageError

_LIVE, _HUB, _PROFILE = "live", "hub:", "profile:"


@dataclass(frozen=True, slots=True)
class Live:
    """A pipeline in this process. `pipe` is None if read from a plan file."""

    pipe: Any = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return _LIVE


@dataclass(frozen=True, slots=True)
class Folder:
    """A pipeline saved in a folder of this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class Hub:
    """A repository of the Hugging Face hub. `revision` is a branch, tag or commit (in a plan), None for main."""

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{_HUB}{self.repo_id}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, slots=True)
class Profile:
    """A pipeline profile, the user's or a bundled one."""

    name: str

    def __str__(self) -> str:
        return f"{_PROFILE}{self.name}"


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A checkpoint in one file: a path, or `owner/name/file.safetensors` in a repository of the hub."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.path


Source = Live | Folder | Hub | Profile | SingleFile


def source_of(model: Any, revision: str | None = None) -> Source:
    """Return the source of `model`: a pipeline object, a path, or the name of a repository or profile.

    Raises:
        UsageError: a `revision` without a repository, or `hub:` not followed by a repository.
    """
    if isinstance(model, Source):
        return model
    if not isinstance(model, str | Path):
        return refuse_options("a pipeline that is loaded already", Live(model), revision=revision)
    name = str(model)
    if name.endswith((".safetensors", ".gguf")):
        return SingleFile(name, revision)
    if Path(model).exists() or name.startswith((".", "/", "~")):
        return refuse_options("a local folder", Folder(Path(model).expanduser()), revision=revision)
    return _named(name, revision)


def _named(name: str, revision: str | None) -> Source:
    if name.startswith(_HUB):
        return refuse_options("a name with its revision", _parse_hub(name), revision=revision)
    return Hub(name, revision) if is_repo_id(name) else refuse_options("a profile", Profile(name), revision=revision)


def parse_source(text: str) -> Source:
    """Parse the source in a plan file: `live`, a folder, `profile:NAME` or `hub:owner/name@commit`.

    Raises:
        UsageError: `hub:` not followed by a repository and a commit.
    """
    if text == _LIVE:
        return Live()
    if text.startswith(_PROFILE):
        return Profile(text.removeprefix(_PROFILE))
    return _parse_hub(text) if text.startswith(_HUB) else Folder(Path(text).expanduser())


def _parse_hub(text: str) -> Hub:
    repo_id, _, commit = text.removeprefix(_HUB).partition("@")
    if not is_repo_id(repo_id) or not commit:
        raise UsageError(f"{text}: write {_HUB}owner/name@revision")
    return Hub(repo_id, commit)


def is_repo_id(name: str) -> bool:
    """Whether a name has the form of a repository: `owner/name`."""
    if "/" not in name:
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def refuse_options(kind: str, source: Source, **given: str | None) -> Source:
    """Return the source. Raises UsageError if an option is `given` that this kind of source does not have."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{name} {value}: {kind} has none to choose from")
    return source
