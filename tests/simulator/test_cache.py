"""The cache of simulations on a disk that is full, read-only, or holds something else: never a reason to fail."""

from __future__ import annotations

import errno
import resource
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vramplan.simulator.cache import cached


@dataclass(frozen=True)
class Found:
    """As large as a simulation."""

    text: str = "x" * 4096


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left(folder: Path) -> list[Path]:
    return list(folder.rglob("*"))


def test_a_disk_that_takes_no_more_of_a_file_is_left_without_one(folder: Path) -> None:
    made: Any = Found()
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        assert cached("key", lambda: made) is made
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert left(folder) == []
    assert cached("key", lambda: made) is made
    assert [path.stat().st_size > 4096 for path in left(folder)] == [True]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_nothing_can_be_made_in(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(code, "no")

    made: Any = Found()
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "NamedTemporaryFile", refuse)
        assert cached("key", lambda: made) is made
    assert left(folder) == []
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert cached("other", lambda: made) is made


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"text": 1}'])
def test_a_damaged_entry_is_made_again(folder: Path, content: bytes) -> None:
    made: Any = Found()
    cached("key", lambda: made)
    (entry,) = left(folder)
    good = entry.read_bytes()
    entry.write_bytes(content)
    assert cached("key", lambda: made) is made
    assert entry.read_bytes() == good
