"""Which card a number of CUDA's means: CUDA is asked in a process of its own, through a library that stands in."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vramplan.hardware import nvidia_order
from vramplan.hardware.nvidia_order import Unit, ask_cuda, cuda_order

A, B = "GPU-1b2f6a50-8c1d-4e7a-9f30-5d2c8e7b1a01", "GPU-c90d41e7-5f62-4a0b-b3c8-0e9a6d5f4b03"
BARE = [uuid.removeprefix("GPU-").replace("-", "") for uuid in (A, B)]
LIBRARY = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetUuid(char *uuid, int device) { return 1; }
int cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, 0x10 + device, 16); return %d; }
"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nvidia_order, "process_uuids", lambda _: None)


def libcuda(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler to make a stand-in for libcuda with")
    (folder / "cuda.c").write_text(LIBRARY % code)
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "cuda.c")], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))


def test_cuda_answers_from_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libcuda(tmp_path, monkeypatch, 0)
    assert ask_cuda() == ["10" * 16, "11" * 16]
    assert "libcuda" not in Path("/proc/self/maps").read_text()


def test_a_cuda_that_fails_answers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libcuda(tmp_path, monkeypatch, 100)
    assert ask_cuda() is None


@pytest.mark.parametrize("text", ["", "no JSON", "3", "null"])
def test_what_is_no_list_is_no_answer(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(nvidia_order, "_QUESTION", f"print({text!r})")
    assert ask_cuda() is None


def test_cuda_is_not_asked_where_there_is_no_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_order, "ask_cuda", lambda: 1 / 0)
    assert cuda_order([Unit(uuid=A)]).candidates == [(0,)]
    assert cuda_order([]).candidates == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", B)
    assert cuda_order([Unit(uuid=A), Unit(uuid=B)]).candidates == [(1,)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert cuda_order([Unit(uuid=A), Unit(uuid=B)]).candidates == [(1,)]


def test_a_device_of_cudas_that_nvml_does_not_know_is_unidentified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_order, "ask_cuda", lambda: [BARE[1], "00" * 16])
    order = cuda_order([Unit(uuid=A), Unit(uuid=B)])
    assert order.candidates == [(1,), (0, 1)]
    assert order.notes == ["nvidia: cuda:1 is none of the devices that the driver names: unidentified"]


PARTS = [Unit(uuid="MIG-1", is_part=True, card=A), Unit(uuid="MIG-2", is_part=True, card=A), Unit(uuid=B)]


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        (f"{B}", False),
        ("GPU-c90d", False),
        ("MIG-2", False),
        ("MIG-1,MIG-2", True),  # of instances CUDA shows one; how many newer drivers show is theirs to say
        ("GPU-1b2f", True),  # a card that is split
        (f"{B},GPU-nothing", True),
        ("GPU-nothing", True),
    ],
)
def test_cuda_is_asked_where_names_leave_doubt(monkeypatch: pytest.MonkeyPatch, text: str, asked: bool) -> None:
    questions: list[str] = []
    monkeypatch.setattr(nvidia_order, "ask_cuda", lambda: questions.append(text) or [BARE[1]])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    order = cuda_order(PARTS)
    assert bool(questions) is asked
    assert order.notes == []
    if asked:
        assert order.candidates == [(2,)]


def test_what_cuda_does_not_answer_is_read_from_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_order, "ask_cuda", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{B},GPU-nothing")
    assert cuda_order(PARTS).candidates == [(2,)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-nothing")
    order = cuda_order(PARTS)
    assert order.candidates == []
    assert "names no device that is here" in order.notes[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1b2f")
    assert cuda_order(PARTS).candidates == [(0, 1)]
    assert cuda_order(PARTS[1:]).candidates == [(0,)]


def test_an_instance_may_be_called_by_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch tells of an instance in some releases is its card's identity."""
    monkeypatch.setattr(nvidia_order, "process_uuids", lambda _: [A.removeprefix("GPU-")])
    order = cuda_order(PARTS)
    assert order.candidates == [(0, 1)]
    assert order.notes == ["nvidia: cuda:0 is one of the MIG instances of its card: unidentified"]
    assert cuda_order(PARTS[1:]) == nvidia_order.Order(candidates=[(0,)])


def test_what_this_process_has_started_is_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the variable was changed after the start."""
    monkeypatch.undo()
    facts = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 1,
        get_device_properties=lambda _: SimpleNamespace(uuid=B.removeprefix("GPU-")),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=facts))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert cuda_order([Unit(uuid=A), Unit(uuid=B)]).candidates == [(1,)]
