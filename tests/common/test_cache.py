"""The cache on a disk that is full, read-only, or holds something else: never a reason to fail."""

from __future__ import annotations

import errno
import random
import resource
import shutil
import signal
import string
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import vramplan
from vramplan.common import cache
from vramplan.common.cache import Codec, collecting, imported_files, json_codec
from vramplan.profiles.recorded import MAKERS
from vramplan.simulator.types import Simulation


@dataclass(frozen=True)
class Found:
    """As large as a simulation, and not to be compressed to nothing."""

    text: str = "".join(random.Random(0).choices(string.printable, k=8192))


FOUND: Codec[Found] = json_codec(Found)
MAKER = "vramplan.simulator.model"


def cached(key: Any, make: Any) -> Any:
    return cache.cached(key, make, FOUND, module=MAKER)


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


def test_a_damaged_or_edited_entry_is_made_again(folder: Path) -> None:
    made: Any = Found()
    cached("key", lambda: made)
    (entry,) = left(folder)
    good = entry.read_bytes()
    edited = FOUND.write(Found("y"))
    packed = zlib.compress(edited)
    for content in (b"", b"{", b"\xff\xfe", good[:-1], good[:16] + packed, packed, edited):
        entry.write_bytes(content)
        assert cached("key", lambda: made) is made
        assert entry.read_bytes() == good
    assert cached("key", lambda: pytest.fail("it is known")) == made


def test_an_entry_under_the_name_of_another_is_not_believed(folder: Path) -> None:
    cached("small", lambda: Found("1 byte"))
    (small,) = left(folder)
    content = small.read_bytes()
    made = cached("large", Found)
    (large,) = set(left(folder)) - {small}
    large.write_bytes(content)
    assert cached("large", Found) == made


def test_what_ships_is_looked_up_first_and_collected(folder: Path) -> None:
    shipped = {cache.key_digest("key"): FOUND.write(Found("shipped"))}
    with collecting() as found:
        got = cache.cached("key", Found, FOUND, module=MAKER, shipped=shipped)
        cached("other", Found)
        cached("other", Found)
    assert got == Found("shipped")
    assert {key: FOUND.read(content) for key, content in found.values()} == {"key": got, "other": Found()}
    assert len(left(folder)) == 1


def test_a_simulation_that_is_read_is_checked_strictly() -> None:
    with pytest.raises(ValueError, match="peak_allocated_bytes"):
        json_codec(Simulation).read(b'{"peak_allocated_bytes": "1"}')


PACKAGE = Path(vramplan.__file__).parent


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package whose files the digest of the code is made of."""
    copy = tmp_path / "vramplan"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "__file__", str(copy / "common" / "cache.py"))
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
    before = cache.code_digest.__wrapped__(MAKER)
    with (copied / file).open("a") as opened:
        opened.write("# changed\n")
    assert (cache.code_digest.__wrapped__(MAKER) != before) == counts


def test_the_code_that_makes_a_value_is_all_that_its_maker_imports() -> None:
    import grimp

    graph = grimp.build_graph("vramplan", cache_dir=None)
    for source in MAKERS:
        paths = imported_files(PACKAGE, source)
        named = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in paths}
        found = {name.removesuffix(".__init__") for name in named}
        assert found == {source, *graph.find_upstream_modules(source)}
    users = graph.find_modules_that_directly_import("vramplan.common.cache")
    # The last two make nothing: one reads what came with the package, one asks the model, which names itself.
    assert users == {*MAKERS, "vramplan.profiles.recorded", "vramplan.simulator.recorded_call"}
