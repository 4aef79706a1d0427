"""The cache of simulations on a disk that is full, read-only, or holds something else: never a reason to fail."""

from __future__ import annotations

import errno
import resource
import shutil
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vramplan.simulator.cache import cached, simulating_files

import vramplan
from vramplan.simulator import cache


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


PACKAGE = Path(vramplan.__file__).parent


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package whose files the digest of the code is made of."""
    copy = tmp_path / "vramplan"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "__file__", str(copy / "simulator" / "cache.py"))
    return copy


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("pipeline/prompt.py", True),
        ("workload.py", True),
        ("planner/footprint.py", True),
        ("simulator/engine.py", True),
        ("strategies/resident.py", True),
        ("strategies/__init__.py", True),
        ("view/plan.py", False),
        ("cli/main.py", False),
    ],
)
def test_simulations_are_of_the_code_that_made_them_and_of_no_other(copied: Path, file: str, counts: bool) -> None:
    before = cache._code.__wrapped__()
    with (copied / file).open("a") as opened:
        opened.write("# changed\n")
    assert (cache._code.__wrapped__() != before) == counts


def test_the_code_that_simulates_is_all_that_a_simulation_imports() -> None:
    import grimp

    named = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in simulating_files(PACKAGE)}
    found = {name.removesuffix(".__init__") for name in named}
    source = "vramplan.simulator.model"
    graph = grimp.build_graph("vramplan", cache_dir=None)
    assert found == {source, *graph.find_upstream_modules(source)}
    writers = {
        module
        for module in graph.modules
        if "vramplan.simulator.cache" in graph.find_modules_directly_imported_by(module)
    }
    assert writers == {source}  # else its imports have to be counted too
