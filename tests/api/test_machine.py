"""Which machine is planned for, by which name, and how fast it is taken to be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vramplan.api import machine
from vramplan.api.machine import choose_machine, find_machine
from vramplan.errors import UsageError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.units import GIB
from vramplan.view.machine import hardware_dict
from vramplan.view.shared import to_yaml

HOST = Host(total_bytes=64 * GIB, available_bytes=48 * GIB)
X4 = 3938461538.4615383  # PCIe 3.0 x4


def card(**facts: object) -> Accelerator:
    known = {"kind": "cuda", "index": 0, "name": "NVIDIA GeForce RTX 4090", "total_bytes": 24 * GIB}
    return Accelerator(**known | {"free_bytes": 20 * GIB} | facts)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch):
    def stand(*cards: Accelerator) -> None:
        monkeypatch.setattr(machine, "detect", lambda: Hardware(accelerators=cards, host=HOST))

    return stand


@pytest.mark.parametrize(
    ("facts", "names"),
    [
        ({"index": 1, "uuid": "GPU-aB"}, ("cuda:1", "CUDA:1", "cuda", "gpu-ab")),
        ({"kind": "rocm"}, ("cuda:0", "cuda", "rocm")),
        ({"kind": "mps"}, ("mps", "mps:0")),
        ({"kind": "xpu"}, ("xpu", "xpu:0")),
    ],
)
def test_a_device_goes_by_every_name_torch_has_for_it(here, facts: dict, names: tuple[str, ...]) -> None:
    here(card(**facts))
    assert {find_machine(name)[1].kind for name in names} == {facts.get("kind", "cuda")}
    with pytest.raises(UsageError, match="this machine has"):
        find_machine("cuda:7")


def test_the_link_that_was_read_counts_and_not_the_profiles(here, tmp_path: Path) -> None:
    here(card())
    full = choose_machine(None)[1].rates
    assert full.link_bytes_per_s == pytest.approx(25.2e9, rel=0.01)
    narrow = card(link_bytes_per_s=X4)
    here(narrow)
    rates = choose_machine(None)[1].rates
    assert rates.link_bytes_per_s == pytest.approx(0.8 * X4)
    assert rates.source == "profile rtx-4090, link assumed at 80% of the 3.94 GB/s of its slot"
    assert (rates.half_flops_per_s, rates.memory_bytes_per_s) == (full.half_flops_per_s, full.memory_bytes_per_s)
    file = tmp_path / "hardware.yaml"
    file.write_text(to_yaml(hardware_dict(Hardware(accelerators=(narrow,), host=HOST), None)))
    assert choose_machine(str(file))[1].rates == rates


def test_known_rates_have_an_uncertainty_and_assumed_ones_none(here) -> None:
    here(card())
    own, profiled = choose_machine(None)[1].rates, choose_machine("a100-40gb")[1].rates
    assert own.uncertainty == profiled.uncertainty
    assert own.uncertainty.computing > 1
    turing = choose_machine("rtx-2080-ti")[1].rates
    assert turing.uncertainty.computing > own.uncertainty.computing


def test_a_card_without_a_profile_still_has_its_link(here) -> None:
    here(card(name="NVIDIA Imaginary 1", link_bytes_per_s=X4))
    rates = choose_machine(None)[1].rates
    assert rates.uncertainty is None
    assert rates.link_bytes_per_s == pytest.approx(0.8 * X4)
    assert rates.source == "assumed: a mid-range card, link assumed at 80% of the 3.94 GB/s of its slot"
    here(card(name="NVIDIA Imaginary 1"))
    assert choose_machine(None)[1].rates is None


def test_finding_a_card_reads_no_profile_and_plans_nothing(tmp_path: Path) -> None:
    """Rates are for plans: `detect` must not wait for them."""
    (tmp_path / "pynvml.py").write_text(STAND_IN)
    code = """
import sys
from vramplan.cli.main import main
try:
    main(["detect", "--json"])
finally:
    print([name for name in sys.modules if name in UNWANTED], file=sys.stderr)
"""
    unwanted = (
        "torch",
        "yaml",
        "vramplan.profiles.catalogue",
        "vramplan.planner.demand",
        "vramplan.strategies",
        "rich.console",
    )
    done = subprocess.run(
        [sys.executable, "-c", code.replace("UNWANTED", repr(unwanted))],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "VRAMPLAN_CALIBRATION": "0"},
    )
    assert '"name": "NVIDIA GeForce RTX 4070"' in done.stdout
    assert done.stderr.strip() == "[]"


STAND_IN = """
class NVMLError(Exception): pass
class NVMLError_LibraryNotFound(NVMLError): pass
class NVMLError_NotSupported(NVMLError): pass
class Memory: total, free = 12 << 30, 11 << 30
nvmlInit = nvmlShutdown = lambda: None
nvmlDeviceGetCount = lambda: 1
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetName = lambda handle: "NVIDIA GeForce RTX 4070"
nvmlDeviceGetMemoryInfo = lambda handle: Memory
"""
