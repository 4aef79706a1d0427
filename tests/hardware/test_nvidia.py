"""The NVIDIA probe against a stand-in for pynvml that raises pynvml's own errors, as the real one does.

Whole machines are in the folder `machines`; here is what holds whatever the machine.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.support.machines import FakeNvml
from vramplan.hardware import nvidia, nvidia_order, sampling, sysroot
from vramplan.hardware.nvidia_nvml import import_nvml
from vramplan.hardware.types import Accelerator, Host
from vramplan.units import GIB

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pynvml as real

HOST = Host(total_bytes=128 * GIB, available_bytes=100 * GIB)
FACTS = [
    "Name",
    "UUID",
    "PciInfo",
    "MigMode",
    "CudaComputeCapability",
    "MaxPcieLinkGeneration",
    "CurrPcieLinkWidth",
    "DisplayActive",
    "ComputeRunningProcesses",
    "GraphicsRunningProcesses",
    "MPSComputeRunningProcesses",
    "VirtualizationMode",
    "AddressingMode",
    "NumaNodeId",
]


def card(name: str = "NVIDIA GeForce RTX 4090", uuid: str = "GPU-aaaa-1", **facts: Any) -> dict[str, Any]:
    memory = {"total": 24 * GIB, "free": 20 * GIB}
    link = {"MaxPcieLinkGeneration": 4, "CurrPcieLinkWidth": 16}
    return {"Name": name, "UUID": uuid, "MemoryInfo": memory, "CudaComputeCapability": [8, 9], **link, **facts}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setattr(sysroot, "ROOT", tmp_path)
    monkeypatch.setattr(sampling, "SECONDS", 0.0)
    monkeypatch.setattr(nvidia_order, "ask_cuda", lambda: None)
    monkeypatch.setattr(nvidia, "torch_backends", lambda: frozenset({"cuda"}))


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch):
    def run(*cards: dict[str, Any], **told: Any) -> tuple[list[Accelerator], list[str]]:
        fake = FakeNvml({"cards": list(cards), "driver": "570.86.10", **told})
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        found = list(nvidia.probe(HOST))
        assert fake.sessions == 0, "NVML was left open"
        return [x for x in found if isinstance(x, Accelerator)], [x for x in found if isinstance(x, str)]

    return run


def test_the_fake_offers_nothing_that_pynvml_does_not() -> None:
    offered = [name for name in vars(FakeNvml) if name.lower().startswith("nvml")]
    assert offered
    assert [name for name in offered if not hasattr(real, name)] == []
    with pytest.raises(AttributeError):
        FakeNvml({}).nvmlDeviceGetNothingOfTheKind  # noqa: B018


@pytest.mark.parametrize("code", ["DRIVER_NOT_LOADED", "LIB_RM_VERSION_MISMATCH", "UNKNOWN"])
def test_a_broken_driver_is_noted(probe, code: str) -> None:
    cards, (note,) = probe(error=code)
    assert cards == []
    assert str(real.NVMLError(getattr(real, f"NVML_ERROR_{code}"))) in note


def test_a_missing_module_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (note,) = nvidia.probe(HOST)
    assert "nvidia-ml-py" in note


def test_a_warning_of_the_module_stays_quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text("import warnings\nwarnings.warn('deprecated', FutureWarning)\n")
    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert import_nvml().__file__ == str(tmp_path / "pynvml.py")


@pytest.mark.parametrize("failing", FACTS)
@pytest.mark.parametrize("code", ["NOT_SUPPORTED", "NO_PERMISSION", "FUNCTION_NOT_FOUND", "GPU_IS_LOST"])
def test_one_missing_fact_does_not_lose_the_card(probe, failing: str, code: str) -> None:
    (found,), notes = probe(card(**{failing: {"error": code}}))
    assert notes == []
    assert (found.total_bytes, found.free_bytes) == (24 * GIB, 20 * GIB)


@pytest.mark.parametrize("failing", FACTS)
@pytest.mark.parametrize("answer", [None, -1, 10**30, "\ufffd", [], [None], {}, b"\xff\xfe"])
def test_one_senseless_fact_does_not_lose_the_card(probe, failing: str, answer: Any) -> None:
    (found,), _ = probe(card(**{failing: answer}))
    assert (found.total_bytes, found.free_bytes) == (24 * GIB, 20 * GIB)


@pytest.mark.parametrize("total", [0, -1, 1 << 60, None, "24"])
def test_a_senseless_memory_loses_it(probe, total: Any) -> None:
    cards, (note,) = probe(card(MemoryInfo={"total": total, "free": GIB}))
    assert cards == []
    assert "card 0 could not be read (it names no memory)" in note


@pytest.mark.parametrize("free", [-1, None, 1 << 60])
def test_a_senseless_free_is_unknown(probe, free: Any) -> None:
    (found,), _ = probe(card(MemoryInfo={"total": 24 * GIB, "free": free}))
    assert found.free_bytes is None


def test_an_unexpected_failure_still_closes_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml({"cards": [card()]})
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(fake, "nvmlDeviceGetCount", lambda: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        list(nvidia.probe(HOST))
    assert fake.sessions == 0


def test_cards_that_cannot_be_counted_are_noted(probe) -> None:
    _, (note,) = probe(count={"error": "NO_PERMISSION"})
    assert "Insufficient Permissions" in note


def test_a_card_of_nearly_the_hosts_size_is_not_taken_for_shared(probe) -> None:
    (found,), _ = probe(card(MemoryInfo={"total": HOST.total_bytes * 99 // 100, "free": GIB}))
    assert not found.unified


def test_the_link_is_what_slot_and_card_allow(probe) -> None:
    (narrow,), _ = probe(card(MaxPcieLinkGeneration=3, CurrPcieLinkWidth=4))
    assert narrow.link_bytes_per_s == pytest.approx(3.94e9, rel=0.01)
    (by_maximum,), _ = probe(
        card(MaxPcieLinkGeneration=3, CurrPcieLinkWidth={"error": "NOT_SUPPORTED"}, MaxPcieLinkWidth=16)
    )
    assert by_maximum.link_bytes_per_s == pytest.approx(15.75e9, rel=0.01)
    (unknown,), _ = probe(card(MaxPcieLinkGeneration=9))
    assert unknown.link_bytes_per_s is None


def test_this_very_process_is_no_neighbour(probe) -> None:
    import os

    (found,), _ = probe(card(ComputeRunningProcesses=[{"pid": os.getpid(), "usedGpuMemory": GIB}]))
    assert found.others == ()


@pytest.mark.parametrize(
    ("built", "words"),
    [
        (frozenset(), "for the processor alone"),
        (frozenset({"hip"}), "for AMD cards"),
        (frozenset({"xpu"}), "for Intel cards"),
        (frozenset({"cuda"}), None),
        (None, None),
    ],
)
def test_a_torch_that_cannot_use_the_card_is_said(probe, monkeypatch, built, words: str | None) -> None:
    monkeypatch.setattr(nvidia, "torch_backends", lambda: built)
    assert [words in note for note in probe(card())[1]] == ([] if words is None else [True])
    assert probe(error="DRIVER_NOT_LOADED")[1] == [
        "nvidia: the driver does not answer (Driver Not Loaded); see whether nvidia-smi works"
    ]
