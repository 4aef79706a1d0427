"""A saved pipeline on the hub: its configurations and headers are read where they lie, kilobytes of it, no weight.

What a commit holds never changes, so that what was read of one is kept, and serves without a network too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from vramplan.common.files import cache_folder, write_text
from vramplan.errors import UsageError, VramplanError
from vramplan.pipeline.folder import INDEX
from vramplan.pipeline.hub_http import HubError, UnreachableError, get_start, is_offline
from vramplan.pipeline.repository import FolderRepository, Repository, read_start
from vramplan.units import format_bytes

PREFIX = "hub:"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Assumed: a repository of 20,000 files has a list of 2 MB.
_LONGEST_LIST = 8 << 20
# Assumed: of FLUX.2's 112 GB 1 MB is read.
_MOST_READ = 64 << 20


class HubRepository(Repository):
    """A repository at one commit, whose files have these paths."""

    def __init__(self, repo_id: str, commit: str, paths: frozenset[str]) -> None:
        self.repo_id, self.commit = repo_id, commit
        self.source = f"{PREFIX}{repo_id}@{commit}"
        self._paths = paths
        self._read: dict[str, tuple[bytes, int]] = {}

    def names(self, folder: str) -> frozenset[str]:
        """The names of the files in one of its folders."""
        split = (path.rpartition("/") for path in self._paths)
        return frozenset(name for place, _, name in split if place == folder)

    def where(self, path: str) -> str:
        """Its name, and the path in it."""
        return f"{self.repo_id}/{path}" if path else self.repo_id

    def start(self, path: str, count: int) -> tuple[bytes, int]:
        """The first bytes of a file and its size: from what was read before, from hub's cache, or from the hub.

        Raises:
            VramplanError: no such file; or this repository has had more read of it than any pipeline needs.
        """
        if path not in self._paths:
            raise VramplanError(f"{self.where(path)} is missing")
        found = self._read.get(path) or _kept(self._key(path))
        if found is None or len(found[0]) < min(count, found[1]):
            found = self._fetched(path, count)
            _keep(self._key(path), found)
        self._read[path] = found
        return found[0][:count], found[1]

    def _fetched(self, path: str, count: int) -> tuple[bytes, int]:
        from huggingface_hub import hf_hub_url, try_to_load_from_cache

        local = try_to_load_from_cache(self.repo_id, path, revision=self.commit)
        if isinstance(local, str):
            return read_start(Path(local), count)
        if sum(len(data) for data, _ in self._read.values()) + count > _MOST_READ:
            told = f"more than {format_bytes(_MOST_READ)} of configurations and headers"
            raise VramplanError(f"{self.where(path)}: {told}: that is no pipeline")
        return get_start(hf_hub_url(self.repo_id, path, revision=self.commit), count, repo_id=self.repo_id)

    def _key(self, path: str) -> str:
        return f"{self.source}/{path}"


def is_repo_id(name: str) -> bool:
    """Whether a name can be one of a repository: `owner/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def open_source(source: str) -> Repository:
    """The repository that a plan calls so: a folder, or `hub:owner/name@commit`."""
    if not source.startswith(PREFIX):
        return FolderRepository(Path(source).expanduser())
    return hub_repository(*split_source(source))


def split_source(source: str) -> tuple[str, str]:
    """Name and commit of what a plan calls `hub:owner/name@commit`. Raises UsageError for anything else."""
    repo_id, _, commit = source.removeprefix(PREFIX).partition("@")
    if not is_repo_id(repo_id) or not commit:
        raise UsageError(f"{source}: write {PREFIX}owner/name@revision")
    return repo_id, commit


def hub_repository(repo_id: str, revision: str | None = None) -> Repository:
    """The repository at this revision, its main branch where left out, at the commit that is now.

    Without a network the one of the last time, or a snapshot in hub's cache.

    Raises:
        HubError: there is none, it may not be read, or the hub cannot be reached and nothing of it was kept.
    """
    wanted = revision or "main"
    fixed = _COMMIT.fullmatch(wanted) is not None
    listing = _kept_listing(repo_id, wanted) if fixed or is_offline() else None
    if listing is None:
        try:
            listing = _asked_listing(repo_id, wanted)
        except UnreachableError:
            listing = _kept_listing(repo_id, wanted)
            snapshot = None if listing else cached_snapshot(repo_id, wanted)
            if snapshot is not None:
                return FolderRepository(snapshot, f"{PREFIX}{repo_id}@{snapshot.name}")
            if listing is None:
                raise
    made = _opened(repo_id, listing[0], listing[1])
    if INDEX in made.names(""):
        made.start(INDEX, 1)  # the list of a gated repository is public: this tells whether its files may be read
    return made


@cache
def _opened(repo_id: str, commit: str, paths: frozenset[str]) -> HubRepository:
    """One for each commit: what it has read serves the next time it is asked for."""
    return HubRepository(repo_id, commit, paths)


def cached_snapshot(repo_id: str, revision: str) -> Path | None:
    """The folder of this revision in hub's own cache, named by its commit, whole or not; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, INDEX, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _asked_listing(repo_id: str, revision: str) -> tuple[str, frozenset[str]]:
    """The commit that a revision is now, and the paths of its files, as the hub tells them."""
    from urllib.parse import quote

    from huggingface_hub import constants

    url = f"{constants.ENDPOINT}/api/models/{repo_id}/revision/{quote(revision, safe='')}"
    data, size = get_start(url, _LONGEST_LIST, repo_id=repo_id)
    try:
        content = json.loads(data)
        found = _listing(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise HubError(f"{repo_id}: the hub's list of its files cannot be read ({size:,} bytes)") from error
    for key in (revision, found[0]):
        _keep(_listing_key(repo_id, key), (_as_bytes(found), 0))
    return found


def _listing(content: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
    commit, paths = content["sha"], frozenset(entry["rfilename"] for entry in content["siblings"])
    if not _COMMIT.fullmatch(commit) or not all(isinstance(path, str) for path in paths):
        raise ValueError("no list of files")
    return commit, paths


def _as_bytes(listing: tuple[str, frozenset[str]]) -> bytes:
    commit, paths = listing
    return json.dumps({"sha": commit, "siblings": [{"rfilename": path} for path in sorted(paths)]}).encode()


def _kept_listing(repo_id: str, revision: str) -> tuple[str, frozenset[str]] | None:
    kept = _kept(_listing_key(repo_id, revision))
    try:
        return None if kept is None else _listing(json.loads(kept[0]))
    except (ValueError, KeyError, TypeError):
        return None


def _listing_key(repo_id: str, revision: str) -> str:
    return f"{PREFIX}{repo_id}@{revision} files"


def _kept_path(key: str) -> Path | None:
    """Where what was read under this key is kept: each endpoint has its own repositories."""
    from huggingface_hub import constants

    folder = cache_folder()
    digest = hashlib.sha256(f"{constants.ENDPOINT} {key}".encode()).hexdigest()[:32]
    return None if folder is None else folder / "hub" / f"{digest}.json"


def _kept(key: str) -> tuple[bytes, int] | None:
    path = _kept_path(key)
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path else {}
        return content["start"].encode("latin-1"), int(content["size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _keep(key: str, found: tuple[bytes, int]) -> None:
    path = _kept_path(key)
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"start": found[0].decode("latin-1"), "size": found[1]}))
    except (OSError, VramplanError):
        pass  # it is read again the next time
