"""The store survives what happens to files: several writers, damage, read-only folders, full disks."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.records import call, probe
from vramplan.calibration import store
from vramplan.calibration.peaks import Peak
from vramplan.calibration.records import SCHEMA, from_line, to_line
from vramplan.calibration.store import append, read_store, store_folder
from vramplan.units import GIB

resource = pytest.importorskip("resource")

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_what_is_kept_is_read_again_in_order(own_store: Path) -> None:
    kept = [call(1), probe(context_bytes=300), call(2, 0.1)]
    assert [append(record) for record in kept] == [None, None, None]
    assert read_store().records == tuple(kept)
    assert read_store().notes == ()
    assert [path.name for path in own_store.iterdir()] == ["calibration.jsonl"]
    assert (own_store / "calibration.jsonl").stat().st_mode & 0o077 == 0


def test_an_empty_machine_has_an_empty_store_and_reading_makes_nothing(own_store: Path) -> None:
    assert read_store() == store.Stored()
    assert not own_store.exists()


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VRAMPLAN_CALIBRATION", "0")
    monkeypatch.chdir(tmp_path)
    assert store_folder() is None
    assert append(call()) is None
    assert read_store().records == ()
    assert list(tmp_path.iterdir()) == []


def test_without_being_told_it_is_in_the_users_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VRAMPLAN_CALIBRATION")
    folder = store_folder()
    assert folder is not None
    assert folder.name == "vramplan"


def _write_many(writer: int, count: int) -> None:
    for number in range(count):
        assert append(call(number, settings="x" * 3000, pipeline=f"Writer{writer}")) is None


def test_processes_that_write_at_once_lose_nothing(own_store: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(writer, 50)) for writer in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(120)
    assert [process.exitcode for process in writers] == [0] * 4
    stored = read_store()
    assert stored.notes == ()
    assert len(stored.records) == 200
    assert {record.pipeline for record in stored.records} == {f"Writer{writer}" for writer in range(4)}


def test_a_writer_that_is_killed_costs_at_most_its_last_line(own_store: Path) -> None:
    append(call(1))
    imports = "from tests.support.records import call\nfrom vramplan.calibration.store import append"
    code = f"{imports}\nwhile True: append(call(2))"
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    try:
        while len(read_store().records) < 20:
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert append(call(3)) is None
    records = read_store().records
    assert (records[0], records[-1]) == (call(1), call(3))


@pytest.mark.parametrize(
    "line",
    [b"{", b"\xff\xfe\x00", b"null", b"[1]", b"12", b'{"schema": 1}', b'{"schema": 1, "kind": "call"}', b"[" * 100000],
)
def test_a_damaged_line_is_skipped_with_a_note_and_the_others_count(own_store: Path, line: bytes) -> None:
    append(call(1))
    with (own_store / "calibration.jsonl").open("ab") as file:
        file.write(line + b"\n")
    append(call(2))
    stored = read_store()
    assert stored.records == (call(1), call(2))
    assert [note.endswith("a line could not be read and were skipped") for note in stored.notes] == [True]


def test_a_line_cut_off_in_the_middle_takes_no_other_with_it(own_store: Path) -> None:
    append(call(1))
    path = own_store / "calibration.jsonl"
    path.write_bytes(path.read_bytes() + to_line(call(2)).encode()[:100])
    assert read_store() == store.Stored(records=(call(1),))  # as while another process is writing it
    append(call(3))
    assert read_store().records == (call(1), call(3))


def test_a_store_with_nothing_readable_is_left_as_it_is_and_the_next_name_taken(own_store: Path) -> None:
    own_store.mkdir()
    broken = own_store / "calibration.jsonl"
    broken.write_bytes(b"\x00" * 5000 + b"\n")
    assert append(call(1)) is None
    stored = read_store()
    assert stored.records == (call(1),)
    assert stored.notes == (f"{broken} holds no readable line: it is left as it is and plays no part",)
    assert broken.read_bytes() == b"\x00" * 5000 + b"\n"
    assert (own_store / "calibration-2.jsonl").exists()


def test_a_folder_in_the_files_place_is_no_reason_to_fail(own_store: Path) -> None:
    (own_store / "calibration.jsonl").mkdir(parents=True)
    assert append(call(1)) is None
    assert read_store().records == (call(1),)
    assert "cannot be read" in read_store().notes[0]


def test_a_file_in_the_folders_place_is_a_note(own_store: Path) -> None:
    own_store.write_text("not a folder")
    note = append(call(1))
    assert note is not None
    assert "could not be kept" in note
    assert read_store().records == ()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_note(own_store: Path) -> None:
    own_store.mkdir(mode=0o500)
    note = append(call(1))
    assert note is not None
    assert "could not be kept" in note


def test_a_folder_on_a_read_only_file_system_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMPLAN_CALIBRATION", "/proc/vramplan")
    note = append(call(1))
    assert note is not None
    assert "could not be kept in /proc/vramplan (" in note
    assert read_store().records == ()


def _limited(limit: int, notes: Any) -> None:
    """In a process of its own: files may grow to so many bytes, as on a disk with no more room than that."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    notes.put([append(call(2)), append(call(2))])


def test_a_disk_that_fills_up_in_the_middle_of_a_line_costs_that_line(own_store: Path) -> None:
    append(call(1))
    size = (own_store / "calibration.jsonl").stat().st_size
    context = multiprocessing.get_context("spawn")
    notes: Any = context.Queue()
    process = context.Process(target=_limited, args=(size + 50, notes))
    process.start()
    cut_off, refused = notes.get(timeout=60)
    process.join(60)
    assert process.exitcode == 0
    assert "could not be kept" in cut_off
    assert cut_off.endswith("(the disk is full)")
    assert "could not be kept" in refused
    assert (own_store / "calibration.jsonl").stat().st_size == size + 50
    assert append(call(3)) is None
    assert read_store().records == (call(1), call(3))


def test_a_later_versions_lines_are_left_alone(own_store: Path) -> None:
    own_store.mkdir()
    (own_store / "calibration.jsonl").write_text(f'{{"schema": {SCHEMA + 1}, "kind": "dream"}}\n')
    append(call(1))
    assert read_store() == store.Stored(records=(call(1),))


def test_a_line_of_the_version_before_phases_is_read(own_store: Path) -> None:
    content = json.loads(to_line(call(1))) | {"schema": 1}
    for name in ("projected", "measured"):
        assert content[name].pop("phases") == {}
    own_store.mkdir()
    (own_store / "calibration.jsonl").write_text(json.dumps(content) + "\n")
    assert read_store() == store.Stored(records=(call(1),))


def test_a_line_of_the_version_before_plans_is_read(own_store: Path) -> None:
    content = json.loads(to_line(call(1))) | {"schema": 2}
    assert content.pop("plan") == ""
    own_store.mkdir()
    (own_store / "calibration.jsonl").write_text(json.dumps(content) + "\n")
    assert read_store() == store.Stored(records=(call(1),))


def test_phases_come_back_and_a_broken_one_costs_its_line(own_store: Path) -> None:
    phases = {"denoise": Peak(allocated_bytes=GIB, reserved_bytes=2 * GIB)}
    record = replace(call(1), measured=replace(call(1).measured, phases=phases))
    append(record)
    assert read_store().records == (record,)
    broken = to_line(record).replace(str(2 * GIB), "-1")
    (own_store / "calibration.jsonl").write_text(f"{broken}\n{to_line(record)}\n")
    assert read_store().records == (record,)
    assert "could not be read" in read_store().notes[0]


def test_of_a_very_long_file_the_end_is_read(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_MOST_BYTES", 5000)
    for number in range(50):
        append(call(number))
    records = read_store().records
    assert 0 < len(records) < 50
    assert records[-1] == call(49)
    assert read_store().notes == ()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@FUZZ
@given(st.binary(max_size=2000))
def test_whatever_bytes_are_in_it_planning_goes_on(own_store: Path, content: bytes) -> None:
    own_store.mkdir(exist_ok=True)
    for path in own_store.iterdir():
        path.unlink()
    (own_store / "calibration.jsonl").write_bytes(content)
    read_store()
    assert append(call(1)) is None
    assert read_store().records[-1] == call(1)
    assert (own_store / "calibration.jsonl").read_bytes().startswith(content)


@FUZZ
@given(st.sampled_from(sorted(json.loads(to_line(call())))), JSON)
def test_a_record_with_one_thing_changed_is_the_record_or_is_refused(key: str, value: object) -> None:
    content = json.loads(to_line(call())) | {key: value}
    try:
        record = from_line(json.dumps(content))
    except ValueError:
        return
    assert record is None or json.loads(to_line(record)).keys() == content.keys()


@FUZZ
@given(st.sampled_from(sorted(json.loads(to_line(call()))["measured"])), JSON)
def test_sizes_are_sizes(key: str, value: object) -> None:
    content = json.loads(to_line(call()))
    content["measured"][key] = value
    try:
        record = from_line(json.dumps(content))
    except ValueError:
        return
    assert record is not None
    found = getattr(record.measured, key)
    sizes = [size for peak in found.values() for size in asdict(peak).values()] if key == "phases" else [found]
    assert all(size is None or 0 <= size < 1 << 62 for size in sizes)
