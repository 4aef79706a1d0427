import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from vramplan.hardware import sysroot
from vramplan.hardware.host import read_host
from vramplan.hardware.types import Host
from vramplan.units import GIB

TOTAL, AVAILABLE = 64 * GIB, 60 * GIB
V1_UNLIMITED = 9223372036854771712


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=TOTAL, available=AVAILABLE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


class Tree:
    """A /proc/self/cgroup and a /sys/fs/cgroup made of files."""

    def __init__(self, root: Path) -> None:
        self.self_cgroup = root / "proc/self/cgroup"
        self.self_cgroup.parent.mkdir(parents=True)
        self.mount = root / "sys/fs/cgroup"
        self.mount.mkdir(parents=True)

    def read(self, *lines: str) -> Host:
        self.self_cgroup.write_text("".join(f"{line}\n" for line in lines))
        return memory_of(read_host())

    def v2(self, group: str, *, inactive: int = 0, **files: object) -> None:
        self._write(self.mount / group, "memory.", files, f"anon 5\ninactive_file {inactive}\n")

    def v1(self, group: str, *, limit: int, usage: int = 0, inactive: int = 0) -> None:
        files = {"limit_in_bytes": limit, "usage_in_bytes": usage}
        statistics = f"inactive_file 7\ntotal_inactive_file {inactive}\n"
        self._write(self.mount / "memory" / group, "memory.", files, statistics)

    @staticmethod
    def _write(directory: Path, prefix: str, files: dict[str, object], statistics: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (directory / f"{prefix}{name}").write_text(f"{value}\n")
        (directory / "memory.stat").write_text(statistics)


def memory_of(host: Host) -> Host:
    """Without the rest, which is what it is."""
    return Host(
        total_bytes=host.total_bytes,
        available_bytes=host.available_bytes,
        limit_bytes=host.limit_bytes,
        limit_source=host.limit_source,
    )


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(sysroot, "ROOT", tmp_path)
    return Tree(tmp_path)


UNLIMITED = Host(total_bytes=TOTAL, available_bytes=AVAILABLE)


def test_without_control_groups_the_machine_is_all_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysroot, "ROOT", tmp_path / "none")
    assert memory_of(read_host()) == UNLIMITED


def test_the_disk_is_the_one_that_weights_would_go_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder that is still to be made, too."""
    monkeypatch.setenv("VRAMPLAN_OFFLOAD", str(tmp_path / "not" / "there"))
    free = shutil.disk_usage(tmp_path).free
    assert read_host().disk_free_bytes == pytest.approx(free, rel=0.05)
    assert not (tmp_path / "not").exists()


def test_v2_limit_and_what_is_left_of_it(tree: Tree) -> None:
    tree.v2("app", max=16 * GIB, current=6 * GIB)
    assert tree.read("0::/app") == Host(
        total_bytes=TOTAL,
        available_bytes=10 * GIB,
        limit_bytes=16 * GIB,
        limit_source="cgroup v2 memory.max at /app",
    )


def test_v2_file_pages_not_lately_used_count_as_free(tree: Tree) -> None:
    tree.v2("app", max=16 * GIB, current=15 * GIB, inactive=9 * GIB)
    assert tree.read("0::/app").available_bytes == 10 * GIB


def test_v2_max_is_no_limit(tree: Tree) -> None:
    tree.v2("app", max="max", high="max", current=6 * GIB)
    assert tree.read("0::/app") == UNLIMITED


def test_v2_high_is_a_limit_too(tree: Tree) -> None:
    tree.v2("app", max=16 * GIB, high=8 * GIB, current=GIB)
    host = tree.read("0::/app")
    assert (host.limit_bytes, host.available_bytes) == (8 * GIB, 7 * GIB)
    assert host.limit_source == "cgroup v2 memory.high at /app"


def test_the_tightest_ancestor_limits(tree: Tree) -> None:
    tree.v2("slice/job/step", max="max", current=GIB)
    tree.v2("slice/job", max=12 * GIB, current=2 * GIB)
    tree.v2("slice", max=32 * GIB, current=4 * GIB)
    host = tree.read("0::/slice/job/step")
    assert (host.limit_bytes, host.available_bytes) == (12 * GIB, 10 * GIB)
    assert host.limit_source == "cgroup v2 memory.max at /slice/job"


def test_an_ancestor_with_the_larger_limit_may_have_less_left(tree: Tree) -> None:
    tree.v2("slice/job", max=12 * GIB, current=2 * GIB)
    tree.v2("slice", max=32 * GIB, current=31 * GIB)  # the siblings use it
    host = tree.read("0::/slice/job")
    assert (host.limit_bytes, host.available_bytes) == (12 * GIB, GIB)


def test_inside_a_container_the_root_is_the_group(tree: Tree) -> None:
    tree.v2("", max=8 * GIB, current=GIB)
    host = tree.read("0::/")
    assert (host.limit_bytes, host.limit_source) == (8 * GIB, "cgroup v2 memory.max at /")


@pytest.mark.parametrize("path", ["/docker/0123abcd", "/../sibling"])
def test_a_path_that_is_not_mounted_leads_to_the_root(tree: Tree, path: str) -> None:
    tree.v2("", max=8 * GIB, current=GIB)
    (tree.mount.parent / "sibling").mkdir()
    (tree.mount.parent / "sibling" / "memory.max").write_text("1\n")
    assert tree.read(f"0::{path}").limit_bytes == 8 * GIB


def test_v1_nested_limit_with_reclaimable_pages(tree: Tree) -> None:
    tree.v1("", limit=V1_UNLIMITED)
    tree.v1("docker", limit=V1_UNLIMITED)
    tree.v1("docker/one", limit=16 * GIB, usage=12 * GIB, inactive=6 * GIB)
    host = tree.read("5:cpuset:/", "4:memory:/docker/one", "0::/")
    assert (host.limit_bytes, host.available_bytes) == (16 * GIB, 10 * GIB)
    assert host.limit_source == "cgroup v1 memory.limit_in_bytes at /docker/one"


def test_v1_unlimited_sentinel_is_no_limit(tree: Tree) -> None:
    tree.v1("", limit=V1_UNLIMITED)
    tree.v1("nested/deep", limit=V1_UNLIMITED, usage=GIB)
    assert tree.read("9:name=systemd:/", "4:memory:/nested/deep", "0::/") == UNLIMITED


def test_controllers_that_share_a_hierarchy_are_recognised(tree: Tree) -> None:
    tree.v1("", limit=4 * GIB)
    assert tree.read("4:cpu,memory:/").limit_bytes == 4 * GIB


def test_a_limit_above_the_machine_is_no_limit(tree: Tree) -> None:
    tree.v2("app", max=TOTAL, current=50 * GIB)
    assert tree.read("0::/app") == UNLIMITED


def test_a_group_over_its_limit_has_nothing_left(tree: Tree) -> None:
    tree.v2("app", max=GIB, current=2 * GIB)
    assert tree.read("0::/app").available_bytes == 0


def test_more_reclaimable_than_used_never_gives_more_than_the_limit(tree: Tree) -> None:
    tree.v2("app", max=GIB, current=0, inactive=GIB)
    assert tree.read("0::/app").available_bytes == GIB


def test_the_machine_may_have_less_than_the_limit_leaves(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=TOTAL, available=2 * GIB))
    tree.v2("app", max=16 * GIB, current=GIB)
    assert tree.read("0::/app").available_bytes == 2 * GIB
