"""Read a saved pipeline on the hub: kilobytes of configurations and headers, no weights.

The content of a commit never changes, so that the parts read are cached, and available without a network too.
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
from vramplan.errors import VramplanError
from vramplan.pipeline.folder import INDEX
from vramplan.pipeline.hub_http import HubError, UnreachableError, get_start, is_offline
from vramplan.pipeline.repository import FolderRepository, Repository, read_start
from vramplan.pipeline.sources import Folder, Hub
from vramplan.units import format_bytes

_COMMIT = re.compile(r"[0-9a-f]{40}")
# Assumed: the listing of a repository with 20,000 files has 2 MB.
_MAX_LISTING_BYTES = 8 << 20
# Assumed: 1 MB is read of FLUX.2's 112 GB.
_MAX_READ_BYTES = 64 << 20


class HubRepository(Repository):
    """A repository on the hub at one commit; `paths` are those of its files."""

    def __init__(self, repo_id: str, commit: str, paths: frozenset[str]) -> None:
        self.repo_id, self.commit = repo_id, commit
        self.source = Hub(repo_id, commit)
        self._paths = paths
        self._read: dict[str, tuple[bytes, int]] = {}

    def names(self, folder: str) -> frozenset[str]:
        """The names of the files in one of its folders."""
        split = (path.rpartition("/") for path in self._paths)
        return frozenset(name for place, _, name in split if place == folder)

    def where(self, path: str) -> str:
        """The repository's name, followed by the path in it."""
        return f"{self.repo_id}/{path}" if path else self.repo_id

    def start(self, path: str, count: int) -> tuple[bytes, int]:
        """The first `count` bytes of a file and its size: from earlier reads, hub's cache, or the hub.

        Raises:
            VramplanError: no such file, or more bytes were read from this repository than any pipeline needs.
        """
        if path not in self._paths:
            raise VramplanError(f"{self.where(path)} is missing")
        found = self._read.get(path) or _read_kept(self._key(path))
        if found is None or len(found[0]) < min(count, found[1]):
            found = self._fetch(path, count)
            _write_kept(self._key(path), found)
        self._read[path] = found
        return found[0][:count], found[1]

    def _fetch(self, path: str, count: int) -> tuple[bytes, int]:
        from huggingface_hub import hf_hub_url, try_to_load_from_cache

        local = try_to_load_from_cache(self.repo_id, path, revision=self.commit)
        if isinstance(local, str):
            return read_start(Path(local), count)
        if sum(len(data) for data, _ in self._read.values()) + count > _MAX_READ_BYTES:
            excess = f"more than {format_bytes(_MAX_READ_BYTES)} of configurations and headers"
            raise VramplanError(f"{self.where(path)}: {excess}: that is no pipeline")
        return get_start(hf_hub_url(self.repo_id, path, revision=self.commit), count, repo_id=self.repo_id)

    def _key(self, path: str) -> str:
        return f"{self.source}/{path}"


def open_repository(source: Folder | Hub) -> Repository:
    """The saved pipeline that a source names.

    Raises:
        HubError: as `hub_repository` does.
    """
    return FolderRepository(source.path) if isinstance(source, Folder) else hub_repository(source)


def hub_repository(source: Hub) -> Repository:
    """The repository at its revision, or at the main branch's newest commit.

    Without a network, the commit seen last, or a snapshot in hub's cache.

    Raises:
        HubError: it does not exist or may not be read, or the hub cannot be reached and nothing is cached.
    """
    repo_id, wanted = source.repo_id, source.revision or "main"
    fixed = _COMMIT.fullmatch(wanted) is not None
    listing = _read_kept_listing(repo_id, wanted) if fixed or is_offline() else None
    if listing is None:
        try:
            listing = _fetch_listing(repo_id, wanted)
        except UnreachableError:
            listing = _read_kept_listing(repo_id, wanted)
            snapshot = None if listing else cached_snapshot(repo_id, wanted)
            if snapshot is not None:
                return FolderRepository(snapshot, Hub(repo_id, snapshot.name))
            if listing is None:
                raise
    made = _repository_at(repo_id, listing[0], listing[1])
    if INDEX in made.names(""):
        made.start(INDEX, 1)  # a gated repository's listing is public: this checks that its files may be read
    return made


@cache
def _repository_at(repo_id: str, commit: str, paths: frozenset[str]) -> HubRepository:
    """One repository object per commit, so that it reuses the bytes already read."""
    return HubRepository(repo_id, commit, paths)


def cached_snapshot(repo_id: str, revision: str) -> Path | None:
    """The folder of this revision in hub's own cache, named by its commit, maybe incomplete; None if missing."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, INDEX, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _fetch_listing(repo_id: str, revision: str) -> tuple[str, frozenset[str]]:
    """Ask the hub for the current commit of a revision, and the paths of its files."""
    from urllib.parse import quote

    from huggingface_hub import constants

    url = f"{constants.ENDPOINT}/api/models/{repo_id}/revision/{quote(revision, safe='')}"
    data, size = get_start(url, _MAX_LISTING_BYTES, repo_id=repo_id)
    try:
        content = json.loads(data)
        found = _parse_listing(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise HubError(f"{repo_id}: the hub's list of its files cannot be read ({size:,} bytes)") from error
    for key in (revision, found[0]):
        _write_kept(_listing_key(repo_id, key), (_listing_bytes(found), 0))
    return found


def _parse_listing(content: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
    commit, paths = content["sha"], frozenset(entry["rfilename"] for entry in content["siblings"])
    if not _COMMIT.fullmatch(commit) or not all(isinstance(path, str) for path in paths):
        raise ValueError("no list of files")
    return commit, paths


def _listing_bytes(listing: tuple[str, frozenset[str]]) -> bytes:
    commit, paths = listing
    return json.dumps({"sha": commit, "siblings": [{"rfilename": path} for path in sorted(paths)]}).encode()


def _read_kept_listing(repo_id: str, revision: str) -> tuple[str, frozenset[str]] | None:
    kept = _read_kept(_listing_key(repo_id, revision))
    try:
        return None if kept is None else _parse_listing(json.loads(kept[0]))
    except (ValueError, KeyError, TypeError):
        return None


def _listing_key(repo_id: str, revision: str) -> str:
    return f"{Hub(repo_id, revision)} files"


def _kept_path(key: str) -> Path | None:
    """The cache file for this key, which includes the endpoint, as each has its own repositories."""
    from huggingface_hub import constants

    folder = cache_folder()
    digest = hashlib.sha256(f"{constants.ENDPOINT} {key}".encode()).hexdigest()[:32]
    return None if folder is None else folder / "hub" / f"{digest}.json"


def _read_kept(key: str) -> tuple[bytes, int] | None:
    path = _kept_path(key)
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path else {}
        return content["start"].encode("latin-1"), int(content["size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_kept(key: str, found: tuple[bytes, int]) -> None:
    path = _kept_path(key)
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"start": found[0].decode("latin-1"), "size": found[1]}))
    except (OSError, VramplanError):
        pass  # the next run reads it again
