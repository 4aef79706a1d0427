"""Cache values on disk. A stale, damaged or edited entry is made again, never used and never an error."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from vramplan.common.files import cache_folder, write_bytes
from vramplan.common.versions import versions
from vramplan.errors import VramplanError

# The imports of the package's own modules, wherever they stand in a file: the style has no other form of them.
_IMPORT = re.compile(r"^ *from (vramplan[\w.]*) import (?:\(([^)]*)\)|(.*))$", re.MULTILINE)
_DIGEST_BYTES = 16

T = TypeVar("T")
NOTHING: Mapping[str, bytes] = MappingProxyType({})
_collecting: list[dict[str, tuple[Any, bytes]]] = []


@contextmanager
def collecting() -> Iterator[dict[str, tuple[Any, bytes]]]:
    """Context manager: collect every value that is looked up or stored, and its key, by the digest of that."""
    found: dict[str, tuple[Any, bytes]] = {}
    _collecting.append(found)
    try:
        yield found
    finally:
        _collecting.remove(found)


@dataclass(frozen=True, slots=True)
class Codec(Generic[T]):
    """How a value is written to bytes and read back. `read` raises ValueError for what is none."""

    write: Callable[[T], bytes]
    read: Callable[[bytes], T]


@cache
def json_codec(kind: Any) -> Codec[Any]:
    """The codec of a dataclass, as JSON that is checked strictly when it is read."""

    @cache
    def adapter() -> Any:
        from pydantic import TypeAdapter

        return TypeAdapter(kind)

    return Codec(
        write=lambda value: adapter().dump_json(value),
        read=lambda content: adapter().validate_json(content, strict=True),  # its ValidationError is a ValueError
    )


def cached(
    key: Any, make: Callable[[], T], codec: Codec[T], *, module: str, shipped: Mapping[str, bytes] = NOTHING
) -> T:
    """Return the value cached under this key, or make it and cache it.

    `key` is any JSON value. The code that makes the value counts as well: that of `module` and all it imports, and the
    versions of the libraries. `VRAMPLAN_CACHE` names another folder; `0` turns the cache off. `shipped` are values that
    came with the package, by the digest of their key.
    """
    found = lookup(key, codec, module=module, shipped=shipped)
    if found is None:
        found = make()
        store(key, found, codec, module=module)
    return found


def lookup(key: Any, codec: Codec[T], *, module: str, shipped: Mapping[str, bytes] = NOTHING) -> T | None:
    """The value shipped or cached under this key, None without one."""
    digest = key_digest(key)
    if digest in shipped:
        content = shipped[digest]
        for collected in _collecting:
            collected[digest] = key, content
        return codec.read(content)
    found = _lookup(key, codec, module)
    if found is not None:
        for collected in _collecting:
            collected[digest] = key, codec.write(found)
    return found


def _lookup(key: Any, codec: Codec[T], module: str) -> T | None:
    folder = cache_folder()
    if folder is None:
        return None
    digest = _entry(key, module)
    return _read(folder / digest, digest, codec)


def store(key: Any, value: T, codec: Codec[T], *, module: str) -> None:
    """Cache a value under this key."""
    for collected in _collecting:
        collected[key_digest(key)] = key, codec.write(value)
    folder = cache_folder()
    if folder is not None:
        digest = _entry(key, module)
        _write(folder / digest, digest, codec.write(value))


def _entry(key: Any, module: str) -> str:
    return key_digest([code_digest(module), versions(), key])


def key_digest(key: Any) -> str:
    """The digest of a JSON value; other values in it count by their text."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[: 2 * _DIGEST_BYTES]


@cache
def code_digest(module: str) -> str:
    """The digest of the code of a module and of all it imports, so that a change of it is a change of version."""
    found = hashlib.sha256()
    for path in imported_files(Path(__file__).parent.parent, module):
        found.update(path.read_bytes())
    return found.hexdigest()


def imported_files(package: Path, module: str) -> list[Path]:
    """The package's files that a module imports, wherever in a file the import stands; read, and not executed."""
    files = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or name not in files:
            continue
        found.add(name)
        for imported, several, one in _IMPORT.findall(files[name].read_text(encoding="utf-8")):
            names = (f"{imported}.{part}" for part in re.findall(r"\w+", several or one))
            waiting += {inner if inner in files else imported for inner in names}
    return [files[name] for name in sorted(found)]


def _read(path: Path, digest: str, codec: Codec[T]) -> T | None:
    try:
        content = path.read_bytes()
        mark, content = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return codec.read(zlib.decompress(content)) if mark == _checksum(digest, content) else None
    except (OSError, ValueError, zlib.error):
        return None


def _write(path: Path, digest: str, content: bytes) -> None:
    try:
        content = zlib.compress(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, _checksum(digest, content) + content)
    except (OSError, VramplanError):
        pass  # with a full disk or a read-only folder the next run takes a few seconds longer


def _checksum(digest: str, content: bytes) -> bytes:
    """The sum that an entry begins with: content under another key, or edited by hand, has another one."""
    return hashlib.blake2b(content, key=digest.encode(), digest_size=_DIGEST_BYTES).digest()
