"""What was measured of a card is the next plan's price, and the plan says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import vramplan
from tests.support.records import CARD, probe
from vramplan.calibration.measured_rates import probe_fields, with_measured_rates, with_measurements
from vramplan.calibration.store import append
from vramplan.hardware import measurements
from vramplan.hardware.rates import Rates
from vramplan.hardware.types import Accelerator, Hardware, Host, Measurement
from vramplan.planfile.file import dump_plan, parse_plan
from vramplan.planner.clock import DEFAULT_RATES
from vramplan.units import GIB
from vramplan.view.machine import hardware_dict
from vramplan.view.shared import to_yaml

KNOWN = Rates(memory_bytes_per_s=1e12, link_bytes_per_s=25e9, half_flops_per_s=100e12, reached=0.66, source="profile")
KNOWN_CARD = replace(CARD, rates=KNOWN)


def keep(**measured: object) -> None:
    assert append(probe(**measured)) is None


def rates(accelerator: Accelerator = KNOWN_CARD) -> Rates:
    found = with_measured_rates(accelerator).rates
    assert found is not None
    return found


def of(what: str, median: float) -> Measurement:
    unit = "s" if what == "launch" else "operations/s" if "float" in what else "bytes/s"
    return Measurement(what=what, unit=unit, median=median, least=median, most=median, runs=1)


MEASURED = (
    of("host_to_device_pinned", 20e9),
    of("device_to_host", 21e9),
    of("host_to_device_pageable", 6e9),
    of("device_to_host_pageable", 3e9),
    of("within_device", 800e9),
    *(of(f"product_bfloat16_{side}", flops) for side, flops in ((2048, 30e12), (4096, 50e12), (8192, 60e12))),
    of("attention_bfloat16_64", 25e12),
    of("attention_bfloat16_128", 75e12),
    of("launch", 12e-6),
)


def test_without_measurements_nothing_changes() -> None:
    assert with_measured_rates(KNOWN_CARD) is KNOWN_CARD
    assert with_measured_rates(CARD) is CARD
    assert with_measurements(CARD, ()) is CARD


def test_the_measured_link_is_the_next_plans() -> None:
    keep(pinned_to_device_bytes_per_s=11e9)
    found = rates()
    assert (found.link_bytes_per_s, found.reached, found.memory_bytes_per_s) == (11e9, 0.66, 1e12)
    assert found.source == "profile; measured on 2026-11-21: copies from page-locked memory"


def test_measured_copies_of_pageable_memory_replace_the_constants() -> None:
    keep(pageable_to_device_bytes_per_s=5e9, device_to_pageable_bytes_per_s=2e9)
    found = rates()
    assert (found.from_pageable_bytes_per_s, found.back_bytes_per_s) == (5e9, 2e9)
    assert found.measured == ("copies from pageable memory", "copies back to pageable memory")


def test_launches_and_the_disk_are_as_measured() -> None:
    keep(launch_seconds=9e-6, disk_bytes_per_s=7e9)
    found = rates()
    assert (found.launch_seconds, found.disk_bytes_per_s) == (9e-6, 7e9)
    assert found.measured == ("kernel launches", "disk reads")


def test_products_are_not_taken_to_be_faster_than_measured() -> None:
    keep(half_flops_per_s=40e12)  # a record of one size, as older ones are
    assert rates().flops_per_s("product float16") == pytest.approx(40e12)
    keep(half_flops_per_s=60e12, product_flops_per_s={"2048": 30e12, "4096": 50e12, "8192": 60e12})
    assert rates().flops_per_s("product float16") == pytest.approx(50e12)
    keep(half_flops_per_s=90e12, product_flops_per_s={"4096": 90e12})
    assert with_measured_rates(KNOWN_CARD) is KNOWN_CARD


@pytest.mark.parametrize("products", [{}, {"4096": 50e12}])
def test_attention_is_as_fast_as_measured_whatever_products_reach(products: dict[str, float]) -> None:
    keep(attention_flops_per_s={"64": 25e12, "128": 75e12}, product_flops_per_s=products)
    found = rates()
    assert found.flops_per_s("attention float16") == pytest.approx(25e12)
    assert found.flops_per_s("wide_attention float16") == pytest.approx(75e12)
    assert "attention" in found.measured


def test_attention_that_holds_its_scores_is_priced_by_them() -> None:
    metal = replace(KNOWN_CARD, kind="mps", name="M4")
    found = with_measurements(metal, MEASURED).rates
    assert found is not None
    assert (found.attention_share, found.launch_seconds) == (KNOWN.attention_share, 12e-6)


def test_a_card_without_a_profile_has_measured_rates_for_peaks() -> None:
    keep(half_flops_per_s=70e12, memory_bytes_per_s=500e9, pinned_to_device_bytes_per_s=20e9)
    found = rates(CARD)
    assert (found.half_flops_per_s, found.memory_bytes_per_s, found.link_bytes_per_s) == (70e12, 500e9, 20e9)
    assert found.reached == DEFAULT_RATES.reached
    assert found.source == (
        f"{DEFAULT_RATES.source}; measured on 2026-11-21: copies from page-locked memory, memory, products"
    )


def test_the_last_record_of_this_card_counts() -> None:
    keep(launch_seconds=9e-6)
    keep(launch_seconds=8e-6)
    keep(launch_seconds=1e-6, device="Another Card")
    assert rates().launch_seconds == 8e-6


def test_what_detect_measured_counts_where_calibrate_has_nothing(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path))
    monkeypatch.setattr(measurements, "measure_device", lambda accelerator, failed: iter(MEASURED))
    machine = Hardware(accelerators=(CARD,), host=Host(total_bytes=8 * GIB, available_bytes=GIB, disk_in_memory=True))
    measured = measurements.measure_machine(machine, CARD)
    assert measured.accelerators[0].measured == MEASURED
    found = rates()
    assert (found.launch_seconds, found.link_bytes_per_s, found.back_bytes_per_s) == (12e-6, 20e9, 3e9)
    assert found.source.startswith("profile; measured: copies from page-locked memory, ")
    assert rates(replace(KNOWN_CARD, driver="another")) == KNOWN
    keep(launch_seconds=9e-6)
    assert (rates().launch_seconds, rates().link_bytes_per_s) == (9e-6, KNOWN.link_bytes_per_s)


def test_measurements_are_records_fields_and_words_of_others_are_no_fault() -> None:
    odd = (of("product_float16", 1e12), of("attention_float16_wide", 1e12), of("warp", 1.0))
    found = probe_fields((*MEASURED, *odd))
    assert found["product_flops_per_s"] == {"2048": 30e12, "4096": 50e12, "8192": 60e12}
    assert found["attention_flops_per_s"] == {"64": 25e12, "128": 75e12}
    assert (found["half_flops_per_s"], found["launch_seconds"]) == (60e12, 12e-6)
    assert probe_fields(odd) == {}
    assert probe(**found)  # each is a field


def test_a_machine_file_brings_its_measurements_and_the_plan_says_which(small_folder, tmp_path: Path) -> None:
    idle = Host(total_bytes=64 * GIB, available_bytes=60 * GIB)
    host = replace(idle, measured=(of("disk_read", 5e9),))
    card = replace(CARD, name="NVIDIA GeForce RTX 4090", measured=MEASURED)
    file = tmp_path / "hardware.yaml"
    file.write_text(to_yaml(hardware_dict(Hardware(accelerators=(card,), host=host), None)))
    plan = vramplan.plan(str(small_folder("sd15-small")), device=str(file), simulate=False)
    assert plan.machine.accelerator is not None
    found = plan.machine.accelerator.rates
    assert found is not None
    assert (found.launch_seconds, found.disk_bytes_per_s) == (12e-6, 5e9)
    assert set(found.measured) == {
        "copies from page-locked memory", "copies from pageable memory", "copies back to pageable memory",
        "kernel launches", "products", "attention", "disk reads",
    }  # fmt: skip
    assert f"rates     {found.source[:40]}" in str(plan)
    assert parse_plan(dump_plan(plan)).machine.accelerator == plan.machine.accelerator
    file.write_text(to_yaml(hardware_dict(Hardware(accelerators=(replace(card, measured=()),), host=idle), None)))
    assert "\nrates " not in str(vramplan.plan(str(small_folder("sd15-small")), device=str(file), simulate=False))
