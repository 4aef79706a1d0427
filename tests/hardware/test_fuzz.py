"""Machines with files missing, full of garbage or unreadable, and drivers that answer nonsense: nothing ever raises."""

import json
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tests.support import machines
from tests.support.machines import make_budget
from vramplan.hardware.detect import detect
from vramplan.hardware.types import Hardware
from vramplan.view.machine import hardware_dict, hardware_markdown

HARDWARE = TypeAdapter(Hardware)
GARBAGE: tuple[Any, ...] = (
    "",
    "-1",
    "max",
    "9" * 5000,
    "99999999999999999999",
    "1 2 3\n4",
    "\u00b2\u0663",
    "a:b:c:d\n::\n0::relative/../..",
    "0::/" + "x" * 5000,
    "- - -\n1 2 3 4 5 6 - ",
    "memory.max nonsense\n\n   \nkey",
    {"hex": "fffe00ff" * 9},
    {"unreadable": True},
)
PARTS = ("MigDevices", "NvLinks", "C2cLinks", "error")  # not answers but what the stand-in makes them of
ANSWERS: tuple[Any, ...] = (
    None,
    -1,
    10**40,
    "",
    "text",
    [],
    [None, None],
    {},
    {"error": "NOT_SUPPORTED"},
    {"error": "GPU_IS_LOST"},
    {"error": "UNKNOWN"},
    {"total": -5, "free": 10**30},
    {"busId": None},
)


def spoiled(machine: dict[str, Any], seed: int) -> dict[str, Any]:
    """The machine with some of its files and answers gone or senseless."""
    chance = random.Random(seed)
    files = machine.get("files", {})
    for path in list(files):
        turn = chance.random()
        if turn < 0.15:
            del files[path]
        elif turn < 0.4 and not (isinstance(files[path], dict) and "link" in files[path]):
            files[path] = chance.choice(GARBAGE)
    for card in (machine.get("nvml") or {}).get("cards", []):
        for name in list(card):
            if chance.random() < 0.25 and name not in PARTS:
                card[name] = chance.choice(ANSWERS)
    if "CUDA_VISIBLE_DEVICES" in machine.get("environment", {}) or chance.random() < 0.3:
        text = chance.choice(("", "0,", "99", "-1", "MIG-", "GPU-", "GPU-1b2f6,0", "1" * 400, "\u0663", "NoDevFiles"))
        machine.setdefault("environment", {})["CUDA_VISIBLE_DEVICES"] = text
    if chance.random() < 0.2:
        machine["cuda"] = chance.choice(([], ["00"], ["zz" * 16] * 9))
    return machine


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(machines.names()), st.integers(0, 1 << 32))
def test_a_spoiled_machine_is_still_detected(name: str, seed: int) -> None:
    machine = spoiled(machines.load(name), seed)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as root:
        hardware = machines.detected(machine, patch, Path(root))
    check(hardware)


def check(hardware: Hardware) -> None:
    """What holds of every machine: it makes sense, it can be written, read again and shown."""
    failed = [note for note in hardware.notes if "could not be read (" in note and "Error" in note]
    assert not [note for note in failed if not note.startswith("nvidia: card")], failed
    for device in hardware.accelerators:
        assert device.total_bytes > 0
        assert device.free_bytes is None or 0 <= device.free_bytes <= device.total_bytes
    assert 0 <= hardware.host.available_bytes <= hardware.host.total_bytes
    written = json.dumps(asdict(hardware))
    assert HARDWARE.validate_json(written, strict=True) == hardware
    budget = make_budget(hardware, vram="1MiB" if hardware.accelerators else None, ram="1MiB")
    assert hardware_dict(hardware, budget)["schema_version"] == 1
    assert hardware_markdown(hardware, budget)  # the text in it too


@pytest.mark.parametrize("name", ["amd-card", "docker-v1-host-path", "gh200", "intel-card", "host-nvme", "jetson-orin"])
@pytest.mark.parametrize("method", ["read_text", "read_bytes", "glob", "exists", "is_dir", "resolve"])
def test_what_may_not_be_read_is_not_there(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = machines.load(name)
    machines.stand_up(machine, monkeypatch, tmp_path)
    plain = getattr(Path, method)

    def denied(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.is_relative_to(tmp_path):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *arguments, **options)

    monkeypatch.setattr(Path, method, denied)
    hardware = detect()
    monkeypatch.setattr(Path, method, plain)
    check(hardware)


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import psutil

    machines.stand_up(machines.load("cpu-server"), monkeypatch, tmp_path)
    for name in ("virtual_memory", "swap_memory"):
        monkeypatch.setattr(psutil, name, lambda: 1 / 0)
    by_pages = detect().host
    assert by_pages.total_bytes > by_pages.available_bytes > 0
    assert by_pages.swap_total_bytes is None

    def unknown(_: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("os.sysconf", unknown)
    nothing = detect()
    assert nothing.host.total_bytes == 0
    assert nothing.notes == ("host: how much memory there is could not be read: say how much may be used with `ram`",)
