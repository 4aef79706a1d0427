"""Real limits on real processes: control groups and ulimit, where the machine allows to set them."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vramplan.hardware.cgroup import memory_limits
from vramplan.hardware.sysroot import read_number
from vramplan.units import MIB

_READ = """
import sys
from vramplan.hardware.host import read_host
for line in sys.stdin:
    host = read_host()
    print(host.limit_bytes, host.available_bytes, host.limit_source, sep="|", flush=True)
"""
LIMIT = 512 * MIB


class Child:
    """A process that reads its host as often as it is asked."""

    def __init__(self, *prefix: str, **options: object) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", _READ], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
        )

    def host(self) -> tuple[int, int, str]:
        self.process.stdin.write("now\n")
        self.process.stdin.flush()
        limit, available, source = self.process.stdout.readline().strip().split("|")
        return int(limit) if limit != "None" else 0, int(available), source

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=20)
        self.process.stdout.close()


def _own_directory() -> Path | None:
    """This process' own memory group, in whichever version has it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path(f"/sys/fs/cgroup/memory{path}")
    directory = Path("/sys/fs/cgroup") / path.lstrip("/")
    return directory if (directory / "memory.max").exists() else None


class Group:
    """A group below this process' own, with a limit."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = "memory.max" if (directory / "memory.max").exists() else "memory.limit_in_bytes"

    def limit(self, count: int) -> None:
        (self.directory / self.file).write_text(str(count))

    def adopt(self, pid: int) -> None:
        (self.directory / "cgroup.procs").write_text(str(pid))


@pytest.fixture
def group() -> Iterator[Group]:
    parent = _own_directory() if sys.platform == "linux" else None
    if parent is None:
        pytest.skip("no memory control group is mounted")
    directory = parent / f"vramplan-test-{os.getpid()}"
    try:
        directory.mkdir()
        made = Group(directory)
        made.limit(LIMIT)
    except OSError as error:
        if directory.is_dir():
            directory.rmdir()
        pytest.skip(f"control groups may not be made here ({error})")
    yield made
    for _ in range(100):  # the kernel lets go of a group some time after its last process
        try:
            directory.rmdir()
            return
        except OSError:
            time.sleep(0.05)


def test_a_control_group_that_changes_while_the_program_runs(group: Group) -> None:
    child = Child()
    try:
        group.adopt(child.process.pid)
        limit, available, source = child.host()
        assert limit == LIMIT
        assert LIMIT // 2 < available < LIMIT
        assert re.match(r"cgroup v[12] memory\.(max|limit_in_bytes) at /.*vramplan-test", source)
        group.limit(2 * LIMIT)
        changed, more, _ = child.host()
        assert changed == 2 * LIMIT
        assert more - available == pytest.approx(LIMIT, abs=64 * MIB)
    finally:
        child.stop()


def test_file_cache_is_not_in_use(group: Group, tmp_path: Path) -> None:
    """A file read by a process of the group fills it with pages that the kernel gives back."""
    size = LIMIT // 4
    (tmp_path / "weights").write_bytes(os.urandom(MIB) * (size // MIB))
    os.sync()
    with (tmp_path / "weights").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    child = Child()
    try:
        group.adopt(child.process.pid)
        before = child.host()[1]
        reader = subprocess.Popen(
            ["/bin/sh", "-c", 'read go; cat "$0" >/dev/null', str(tmp_path / "weights")], stdin=subprocess.PIPE
        )
        group.adopt(reader.pid)
        reader.communicate(b"go\n", timeout=60)
        used = read_number(group.directory / group.file.replace("max", "current").replace("limit", "usage"))
        assert used > size, "the pages were not charged to the group, so nothing was tested"
        assert child.host()[1] == pytest.approx(before, abs=32 * MIB)
    finally:
        child.stop()


def test_a_limit_of_systemd(tmp_path: Path) -> None:
    scope = ["systemd-run", "--quiet", "--scope", f"--property=MemoryMax={LIMIT}", "--property=MemoryAccounting=yes"]
    user = [] if os.geteuid() == 0 else ["--user"]
    try:
        works = subprocess.run([*scope, *user, "true"], capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        works = False
    if not works:
        pytest.skip("systemd-run cannot make a scope here")
    child = Child(*scope, *user)
    try:
        assert child.host()[0] == LIMIT
    finally:
        child.stop()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no ulimit")
def test_ulimit() -> None:
    child = Child("/bin/sh", "-c", f'ulimit -v {LIMIT // 1024} && exec "$0" "$@"')
    try:
        limit, available, source = child.host()
        assert (limit, source) == (LIMIT, "ulimit -v")
        assert 0 < available < LIMIT
    finally:
        child.stop()


def test_this_process_reads_its_own_groups_without_fail() -> None:
    assert all(limit.left_bytes <= limit.limit_bytes for limit in memory_limits())
