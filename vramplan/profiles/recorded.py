"""What was recorded of a bundled profile's pipeline at its usual workload, so that a plan needs no simulation.

A file holds the values of the cache (`common.cache`) by the digests of their keys. It is valid for the code of vramplan
that made it, and for the source files of the libraries that its recordings ran through, whatever their versions.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vramplan.common.cache import code_digest
from vramplan.profiles.files import bundled_directory

FOLDER, SUFFIX = "recorded", ".xz"
# The modules whose code, with all that they import, makes the values: those that name themselves to `cached`.
MAKERS = ("vramplan.pipeline.describe", "vramplan.simulator.model")
_NOTHING: Mapping[str, bytes] = MappingProxyType({})
_LENGTH = 8


@cache
def recorded(name: str) -> Mapping[str, bytes]:
    """The recorded values of a profile by the digests of their keys; empty if there are none that are valid here.

    The environment variable VRAMPLAN_RECORDED=0 leaves all out.
    """
    if os.environ.get("VRAMPLAN_RECORDED") == "0":
        return _NOTHING
    path = bundled_directory() / FOLDER / f"{name}{SUFFIX}"
    try:
        content = lzma.decompress(path.read_bytes())
        head, end = _split(content)
        if head["code"] != maker_digests() or source_digest(head["sources"]) != head["digest"]:
            return _NOTHING
        found = {}
        for key, size in head["entries"].items():
            found[key] = content[end : end + size]
            end += size
        return found
    except (OSError, lzma.LZMAError, ValueError, KeyError, TypeError, AttributeError):
        return _NOTHING


def is_current(name: str) -> bool:
    """Whether a profile has a file, and that is of the code as it is."""
    path = bundled_directory() / FOLDER / f"{name}{SUFFIX}"
    return path.is_file() and bool(_split(lzma.decompress(path.read_bytes()))[0]["code"] == maker_digests())


def pack(entries: Mapping[str, bytes], sources: Iterable[str]) -> bytes:
    """The content of a file with these values, which were made with these source files (`torch/nn/functional.py`)."""
    names = sorted(sources)
    sizes = {key: len(value) for key, value in sorted(entries.items())}
    head = {"code": maker_digests(), "sources": names, "digest": source_digest(names), "entries": sizes}
    text = json.dumps(head, separators=(",", ":")).encode()
    body = b"".join(entries[key] for key in sizes)
    return lzma.compress(len(text).to_bytes(_LENGTH, "little") + text + body, preset=9 | lzma.PRESET_EXTREME)


def maker_digests() -> list[str]:
    """The digests of the code that makes the values."""
    return [code_digest(module) for module in MAKERS]


def source_digest(names: Iterable[str]) -> str:
    """The digest of source files of libraries, by their path from the folder that the library is in.

    Raises:
        OSError: one is missing.
    """
    found = hashlib.blake2b(digest_size=16)
    for name in names:
        found.update(_root(name.partition("/")[0]).joinpath(name).read_bytes())
    return found.hexdigest()


@cache
def _root(package: str) -> Path:
    spec = find_spec(package)  # which imports nothing
    if spec is None or not spec.origin:
        raise FileNotFoundError(package)
    return Path(spec.origin).parent.parent


def _split(content: bytes) -> tuple[dict[str, Any], int]:
    end = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    return json.loads(content[_LENGTH:end]), end
