import platform
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tests.support.machines import make_budget
from vramplan.hardware import apple
from vramplan.hardware.types import Accelerator, Hardware, Host, ProcessUsage, Reading
from vramplan.units import GIB

HOST = Host(total_bytes=32 * GIB, available_bytes=20 * GIB)


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(apple, "metal_working_set", lambda: None)

    def answer(output: str) -> None:
        result = subprocess.CompletedProcess([], 0, stdout=output, stderr="")
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: result)

    return answer


@pytest.mark.parametrize("machine", [("Linux", "aarch64"), ("Darwin", "x86_64"), ("Windows", "AMD64")])
def test_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch, machine: tuple[str, str]) -> None:
    monkeypatch.setattr(platform, "system", lambda: machine[0])
    monkeypatch.setattr(platform, "machine", lambda: machine[1])
    assert list(apple.probe(HOST)) == []


def test_a_mac_shares_its_memory(mac: Callable[[str], None]) -> None:
    mac("machdep.cpu.brand_string: Apple M2 Max\niogpu.wired_limit_mb: 0\n")
    note, card = apple.probe(HOST)
    assert "assumed" in note
    assert card == Accelerator(
        kind="mps",
        index=0,
        name="Apple M2 Max",
        total_bytes=32 * GIB * 2 // 3,
        free_bytes=20 * GIB,
        unified=True,
        architecture="M2 Max",
        native=("float32", "float16", "bfloat16"),
        free_readings=(Reading(source="available on the host", free_bytes=20 * GIB),),
        free_reason="the memory is the host's",
    )


def test_the_owners_wired_limit_is_kept(mac: Callable[[str], None]) -> None:
    mac("machdep.cpu.brand_string: Apple M2 Max\niogpu.wired_limit_mb: 16384\n")
    (card,) = apple.probe(HOST)
    assert isinstance(card, Accelerator)
    assert (card.total_bytes, card.free_bytes) == (16 * GIB, 16 * GIB)


def test_without_sysctl_the_share_is_assumed(mac: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    _, card = apple.probe(HOST)
    assert isinstance(card, Accelerator)
    assert card.name == "Apple GPU"


def test_metals_own_answer_is_believed(mac: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mac("machdep.cpu.brand_string: Apple M2 Max\n")
    monkeypatch.setattr(apple, "metal_working_set", lambda: 24 * GIB)
    (card,) = apple.probe(HOST)
    assert isinstance(card, Accelerator)
    assert card.total_bytes == 24 * GIB


@pytest.mark.skipif(platform.system() == "Darwin", reason="there, Metal answers")
def test_without_metal_there_is_no_answer() -> None:
    assert apple.metal_working_set() is None


@pytest.mark.parametrize(("memory", "usable_mib"), [(16, 10922), (32, 21845), (64, 49152)])
def test_the_working_set_is_what_was_seen(memory: int, usable_mib: int) -> None:
    assert apple.working_set(memory * GIB) >> 20 == usable_mib


def test_what_metal_says_is_not_assumed_even_where_it_is_what_would_be(mac, monkeypatch: pytest.MonkeyPatch) -> None:
    mac("machdep.cpu.brand_string: Apple M2 Max\n")
    monkeypatch.setattr(apple, "metal_working_set", lambda: apple.working_set(HOST.total_bytes))
    (card,) = apple.probe(HOST)
    assert isinstance(card, Accelerator)


def test_what_this_process_holds_is_no_longer_free(mac, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 GiB that Metal recommends 9 are held: 15 are left, however much the host has."""
    mac("machdep.cpu.brand_string: Apple M2 Max\n")
    monkeypatch.setattr(apple, "metal_working_set", lambda: 24 * GIB)
    metal = SimpleNamespace(driver_allocated_memory=lambda: 9 * GIB, current_allocated_memory=lambda: 8 * GIB)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(mps=metal))
    (card,) = apple.probe(HOST)
    assert card.free_bytes == 15 * GIB
    assert card.own == ProcessUsage(has_context=True, allocated_bytes=8 * GIB, cached_bytes=GIB, fraction=1.0)
    assert [reading.free_bytes for reading in card.free_readings] == [20 * GIB, 15 * GIB]
    budget = make_budget(Hardware(accelerators=(card,), host=HOST), held_vram_bytes=8 * GIB)
    assert budget.vram_bytes <= 24 * GIB - GIB  # what is not this pipeline's stays taken
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    (card,) = apple.probe(HOST)
    assert (card.free_bytes, card.own) == (20 * GIB, None)
