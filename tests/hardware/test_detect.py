"""The real machine, whatever it is, and probes that fail."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from vramplan.hardware.detect import detect
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.units import GIB

detect_module = importlib.import_module("vramplan.hardware.detect")

CARD = Accelerator(kind="cuda", index=0, name="any", total_bytes=GIB, free_bytes=GIB)


def test_the_host_is_what_psutil_says() -> None:
    hardware = detect()
    memory = psutil.virtual_memory()
    assert hardware.host.total_bytes == memory.total
    assert 0 < hardware.host.available_bytes <= memory.total
    limit = hardware.host.limit_bytes
    assert (limit is None) == (hardware.host.limit_source is None)
    if limit is None:
        assert hardware.host.available_bytes == pytest.approx(memory.available, abs=GIB)
    else:
        assert hardware.host.available_bytes <= limit <= memory.total


def test_the_devices_of_one_kind_are_all_different() -> None:
    hardware = detect()
    devices = [card.device for card in hardware.accelerators]
    assert len(set(devices)) == len(devices)
    assert all(card.total_bytes > 0 for card in hardware.accelerators)


def test_detecting_imports_no_torch_and_costs_little() -> None:
    code = """
import sys, time
from vramplan.hardware.detect import detect
detect()
assert "torch" not in sys.modules
print(time.process_time())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.5  # about 0.1 s in truth; the rest is for busy machines
    assert result.stderr == ""


def test_importing_the_room_reads_nothing() -> None:
    code = "import sys, vramplan.hardware; print([m for m in ('pynvml', 'psutil', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def good(_host: Host) -> Iterator[Accelerator | str]:
    yield CARD
    yield "good: something to know"


def bad(_host: Host) -> Iterator[Accelerator | str]:
    yield CARD
    raise OSError("the driver is on strike")


def absent(_host: Host) -> Iterator[Accelerator | str]:
    yield from ()


def run(monkeypatch: pytest.MonkeyPatch, *probes: object) -> Hardware:
    monkeypatch.setattr(detect_module, "PROBES", probes)
    return detect()


def test_an_absent_probe_answers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = run(monkeypatch, absent)
    assert (hardware.accelerators, hardware.notes) == ((), ())


def test_a_failing_probe_leaves_a_note_and_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = run(monkeypatch, bad, good)
    assert hardware.accelerators == (CARD, CARD)
    failure, remark = hardware.notes
    assert failure.endswith("could not be read (OSError: the driver is on strike)")
    assert remark == "good: something to know"


def test_the_probes_see_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Host] = []

    def curious(host: Host) -> Iterator[Accelerator | str]:
        seen.append(host)
        yield from ()

    assert [run(monkeypatch, curious).host] == seen


@pytest.mark.parametrize(("hip", "kept", "out"), [(False, "cuda", "an AMD card"), (True, "rocm", "an NVIDIA card")])
def test_one_torch_has_one_cuda_0(monkeypatch: pytest.MonkeyPatch, hip: bool, kept: str, out: str) -> None:
    def both(_host: Host) -> Iterator[Accelerator]:
        yield replace(CARD, name="an NVIDIA card")
        yield replace(CARD, kind="rocm", name="an AMD card")
        yield replace(CARD, kind="xpu", name="an Intel card")

    monkeypatch.setattr(detect_module, "torch_is_built_for", lambda backend: hip and backend == "hip")
    hardware = run(monkeypatch, both)
    assert [card.kind for card in hardware.accelerators] == sorted([kept, "xpu"])
    vendor = "AMD" if hip else "NVIDIA"
    assert hardware.notes == (
        f"{out} is left out: a torch uses the cards of one vendor, and here those are {vendor}'s",
    )
