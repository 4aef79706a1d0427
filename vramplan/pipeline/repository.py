"""Read the files of a saved pipeline in any location. Only the headers of weight files are read."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from vramplan.errors import VramplanError
from vramplan.pipeline.dtypes import SAFETENSORS_DTYPES
from vramplan.pipeline.sources import Folder, Source
from vramplan.units import format_bytes

# The bytes read first: 97 % of 1,000 popular models have shorter headers (huggingface_hub 2.4,
# `parse_safetensors_file_metadata`).
_HEADER_START_BYTES = 100_000
# huggingface_hub's limit (2.4, SAFETENSORS_MAX_HEADER_LENGTH), a quarter of what safetensors allows.
_MAX_HEADER_BYTES = 25_000_000
# Assumed: the longest shard index seen has 0.2 MB, other configurations less.
_MAX_JSON_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as described by the header of its file: torch's name of the dtype, shape, bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def elements(self) -> int:
        """The number of elements."""
        return prod(self.shape)


class Repository(ABC):
    """A saved pipeline. Paths are relative to it, with slashes.

    `source` is its name in a plan; `folder` holds all of its files on this machine, None if they are not here.
    """

    source: Source
    folder: Path | None = None

    @abstractmethod
    def names(self, folder: str) -> frozenset[str]:
        """The names of the files in one of its folders (`""` is the root); empty if there is no such folder."""

    @abstractmethod
    def start(self, path: str, count: int) -> tuple[bytes, int]:
        """The first `count` bytes of a file, or fewer, and the size of the whole file.

        Raises:
            VramplanError: no such file, or one that cannot be read.
        """

    @abstractmethod
    def where(self, path: str) -> str:
        """The name of the file for messages; that of the repository for an empty path."""

    def read_json(self, path: str) -> dict[str, Any]:
        """The object in a JSON file. Raises VramplanError if the file is missing, damaged, too long or no object."""
        data, size = self.start(path, _MAX_JSON_BYTES)
        if size > _MAX_JSON_BYTES:
            raise VramplanError(
                f"{self.where(path)}: {format_bytes(size)} are no configuration (limit {format_bytes(_MAX_JSON_BYTES)})"
            )
        try:
            content = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise VramplanError(f"{self.where(path)}: not readable JSON ({error})") from error
        if not isinstance(content, dict):
            raise VramplanError(f"{self.where(path)}: expected an object, found {type(content).__name__}")
        return content

    def header(self, path: str) -> tuple[list[StoredTensor], dict[str, str]]:
        """The tensors of a safetensors file, and its metadata, from its header.

        Raises:
            VramplanError: the file is truncated, or its header is damaged or too long.
        """
        data, size = self.start(path, _HEADER_START_BYTES)
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise self._unreadable(path, f"a header of {length:,} bytes in a file of {size:,}")
        if 8 + length > len(data):
            data, _ = self.start(path, 8 + length)
        try:
            header = json.loads(data[8 : 8 + length].decode("utf-8"))
            metadata = {str(key): str(text) for key, text in (header.pop("__metadata__", None) or {}).items()}
            found = [_tensor(name, entry, size - 8 - length) for name, entry in header.items()]
        except _CutOffError:
            message = f"{self.where(path)}: the file ends before its tensors do; download or save it again"
            raise VramplanError(message) from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self._unreadable(path, f"its header is damaged: {' '.join(str(error).split())[:200]}") from error
        return found, metadata

    def _unreadable(self, path: str, reason: str) -> VramplanError:
        return VramplanError(f"{self.where(path)}: not a readable safetensors file ({reason})")


class _CutOffError(Exception):
    """A tensor lies beyond the end of its file."""


def _tensor(name: str, entry: Any, data_bytes: int) -> StoredTensor:
    (start, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (start, end - start, *shape)):
        raise ValueError(f"no tensor is like {str(entry)[:100]}")
    if end > data_bytes:
        raise _CutOffError
    return StoredTensor(
        name=name, dtype=SAFETENSORS_DTYPES.get(dtype, dtype.lower()), shape=tuple(shape), size_bytes=end - start
    )


class FolderRepository(Repository):
    """A saved pipeline in a local folder; `source` is by default the folder."""

    def __init__(self, folder: Path, source: Source | None = None) -> None:
        self.folder: Path = folder
        self.source = source or Folder(folder)

    def names(self, folder: str) -> frozenset[str]:
        """The names of the files in one of its folders. Raises VramplanError if the repository does not exist."""
        if not self.folder.is_dir():
            raise VramplanError(f"{self.folder}: no such folder")
        place = self.folder / folder
        try:
            return frozenset(path.name for path in place.iterdir() if path.is_file()) if place.is_dir() else frozenset()
        except OSError as error:
            raise VramplanError(f"{place}: cannot be read ({error.strerror})") from error

    def start(self, path: str, count: int) -> tuple[bytes, int]:
        """The first bytes of a file and its size."""
        return read_start(self.folder / path, count)

    def where(self, path: str) -> str:
        """The file's path on this machine."""
        return str(self.folder / path)


def read_start(path: Path, count: int) -> tuple[bytes, int]:
    """The first `count` bytes of a local file, or fewer, and its size. Raises VramplanError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(count), path.stat().st_size
    except FileNotFoundError:
        raise VramplanError(f"{path} is missing") from None
    except OSError as error:
        raise VramplanError(f"{path}: cannot be read ({error.strerror})") from error
