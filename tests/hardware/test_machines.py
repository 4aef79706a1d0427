"""Every machine of the folder `machines`: the whole detected value. A new machine is a new file there."""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from tests.support import machines
from tests.support.machines import make_budget
from vramplan.hardware.types import Hardware
from vramplan.view.machine import hardware_markdown
from vramplan.view.machine import text_of as hardware_text

NAMES = machines.names()
HARDWARE = TypeAdapter(Hardware)


def expected(machine: dict) -> Hardware:
    return HARDWARE.validate_json(json.dumps(machine["expected"]), strict=True)


def test_there_are_enough_of_them_and_each_names_its_source() -> None:
    assert len(NAMES) >= 40
    for name in NAMES:
        assert len(machines.load(name)["source"]) > 20, name


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_machine(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = machines.load(name)
    assert machines.detected(machine, monkeypatch, tmp_path) == expected(machine)


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_shown_and_hides_who_it_is(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = machines.load(name)
    hardware = machines.detected(machine, monkeypatch, tmp_path)
    budget = make_budget(hardware, vram="1MiB" if hardware.accelerators else None, ram="1MiB")
    text, block = hardware_text(hardware, budget), hardware_markdown(hardware, budget)
    for device in hardware.accelerators:
        assert device.name in text
        assert device.uuid is None or (device.uuid in text and device.uuid not in block)
    assert all(note in text for note in hardware.notes)
