"""The bundled facts about devices agree with each other, with their sources and with what can be built."""

from __future__ import annotations

import itertools
import re
from functools import cache

import pytest

import vramplan
from vramplan.api import plan as planning
from vramplan.hardware.apple import working_set
from vramplan.hardware.types import Host
from vramplan.profiles.catalogue import (
    DeviceProfile,
    compute_capability,
    device_accelerator,
    device_host,
    device_names,
    load_device_profile,
    rates_for,
)
from vramplan.units import GIB, MIB

DEVICES = {name: load_device_profile(name) for name in device_names()}
# What cards are sold with, in GiB; one's total is up to a tenth less (budget's `_NOMINAL_EXCESS`).
SOLD = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 94, 96, 141, 180, 192, 256, 288)
# Chips that share the host's memory are read at up to half a second a pass, cards of their own well below.
PASS_SECONDS = {False: (0.010, 0.100), True: (0.030, 0.500)}
UNITS = {"GiB": GIB, "MiB": MIB, "MB": MIB, "KB": 1024, "bytes": 1}
LINKS = {(3, 16), (4, 8), (4, 16), (5, 8), (5, 16)}

every_device = pytest.mark.parametrize("name", DEVICES)


def numbers(pattern: str, text: str) -> list[tuple[float, str]]:
    return [(float(number.replace(",", "")), unit) for number, unit in re.findall(pattern, text)]


def test_the_asked_for_devices_are_there() -> None:
    assert len(DEVICES) >= 60
    sizes = [profile.memory_bytes for profile in DEVICES.values()]
    assert min(sizes) < 4 * GIB
    assert max(sizes) > 287 * GIB
    assert {profile.kind for profile in DEVICES.values()} == {"cuda", "rocm", "xpu", "mps"}


@every_device
def test_a_device_profile_is_found_by_what_the_driver_calls_it(name: str) -> None:
    profile = DEVICES[name]
    assert profile.name == name
    assert load_device_profile(name.upper()) == profile
    for reported in profile.match:
        rates = rates_for(reported.upper(), profile.memory_bytes)
        assert rates is not None
        assert rates.source.startswith(f"profile {name},")
        assert rates == rates_for(reported.removeprefix("NVIDIA "), profile.memory_bytes)


@every_device
def test_what_is_recalled_or_assumed_is_marked(name: str) -> None:
    profile = DEVICES[name]
    assert profile.unconfirmed == ("recalled" in profile.source or "assumed" in profile.source)


@every_device
def test_the_memory_is_that_of_a_device_that_is_sold(name: str) -> None:
    profile = DEVICES[name]
    titled = [int(size) for size in re.findall(r"(\d+) ?GB", profile.title)]
    if profile.pool_bytes is not None:
        # A whole pool is a few GiB less than its name where a firmware keeps some of it.
        pools = titled or [128]
        assert 0.9 <= profile.pool_bytes / (pools[0] * GIB) <= 1
    else:
        assert [size for size in titled or SOLD if 0.9 <= profile.memory_bytes / (size * GIB) <= 1]


@every_device
def test_the_memory_of_a_mac_is_what_detection_takes_it_for(name: str) -> None:
    profile = DEVICES[name]
    if profile.kind == "mps":
        assert profile.pool_bytes is not None
        assert profile.memory_bytes == working_set(profile.pool_bytes)


@every_device
def test_the_rates_are_those_of_a_device_of_that_size(name: str) -> None:
    profile = DEVICES[name]
    least, most = PASS_SECONDS[profile.pool_bytes is not None]
    assert least <= profile.memory_bytes / (profile.memory_gb_per_s * 1e9) <= most
    # Operations for each byte read: 13 without matrix units (P100), 453 with much of them on GDDR6 (RTX 5000 Ada).
    assert 10 <= profile.half_tflops * 1e3 / profile.memory_gb_per_s <= 500


@every_device
def test_the_link_is_one_that_is_built(name: str) -> None:
    profile = DEVICES[name]
    if profile.link is not None:
        assert (profile.link.generation, profile.link.lanes) in LINKS
    elif profile.pool_bytes is None:
        assert profile.link_bytes_per_s == pytest.approx(450e9)  # NVLink-C2C, one way


@every_device
def test_the_dtypes_are_those_of_the_generation(name: str) -> None:
    profile = DEVICES[name]
    capability = compute_capability(profile.match[0])
    assert (capability is not None) == (profile.kind == "cuda")
    assert {"float32", "float16"} <= set(profile.native)
    if capability is not None:
        assert ("bfloat16" in profile.native) == (capability >= 8)
        assert ("float8_e4m3fn" in profile.native) == (capability >= 8.9)


@every_device
def test_the_figures_are_those_of_the_source(name: str) -> None:
    profile = DEVICES[name]
    rates = [number * {"GB": 1, "TB": 1e3}[unit] for number, unit in numbers(r"([\d.,]+) (GB|TB)/s", profile.source)]
    assert [rate for rate in rates if rate == pytest.approx(profile.memory_gb_per_s, rel=0.01)]
    told = re.search(r"(\d+) tensor cores at ([\d.]+) GHz\); (\d+) FMA", profile.source)
    if told is not None:
        cores, clock, fma = map(float, told.groups())
        assert profile.half_tflops == pytest.approx(cores * clock * fma * 2 / 1e3, rel=0.01)


@every_device
def test_the_memory_is_that_of_the_source(name: str) -> None:
    profile = DEVICES[name]
    _, told, text = profile.source.rpartition("memory: ")
    amounts = [number * UNITS[unit] for number, unit in numbers(r"([\d.,]+) ?(GiB|MiB|MB|KB|bytes)", text)]
    if told and amounts and profile.kind != "mps":
        kept = 16 * MIB if "16 MiB" in text else 0
        known = [*amounts, *(size * GIB for size in SOLD)] if kept else amounts
        assert [size for size in known if profile.memory_bytes == pytest.approx(size - kept, rel=0.001)]


def test_models_that_share_a_name_differ_in_memory_alone() -> None:
    """The memory tells them apart; what is asked for without it, the capability, is the same for all."""
    for one, other in itertools.combinations(DEVICES.values(), 2):
        if set(one.match) & set(other.match):
            assert abs(one.memory_bytes - other.memory_bytes) > 0.1 * max(one.memory_bytes, other.memory_bytes)
            assert one.compute_capability == other.compute_capability


def test_the_memory_picks_among_models_of_one_name() -> None:
    ti = "NVIDIA GeForce RTX 3080"
    assert "rtx-3080," in getattr(rates_for(ti, 10 * GIB), "source", "")
    assert "rtx-3080-12gb," in getattr(rates_for(ti, 12 * GIB), "source", "")


def test_an_unknown_accelerator_has_no_rates() -> None:
    assert rates_for("NVIDIA Imaginary RTX 1") is None
    assert rates_for("NVIDIA A1") is None
    assert rates_for("cuda") is None
    assert rates_for("") is None


def test_a_device_becomes_an_idle_accelerator() -> None:
    accelerator = device_accelerator(load_device_profile("rtx-4090"))
    assert accelerator.device == "cuda:0"
    assert accelerator.name == "NVIDIA GeForce RTX 4090"
    assert accelerator.free_bytes == accelerator.total_bytes
    assert 23 * GIB < accelerator.total_bytes < 24 * GIB
    rates = accelerator.rates
    assert rates is not None
    assert rates.memory_bytes_per_s == pytest.approx(1008e9)
    assert rates.half_flops_per_s == pytest.approx(165.2e12, rel=1e-3)
    # PCIe 4.0 x16: 31.5 GB/s each way, of which 80 % are assumed to be reached.
    assert accelerator.link_bytes_per_s == pytest.approx(31.508e9, rel=1e-3)
    assert rates.link_bytes_per_s == pytest.approx(25.206e9, rel=1e-3)
    assert "assumed" in rates.source


def test_a_device_that_shares_its_hosts_memory_brings_that_host() -> None:
    here = Host(total_bytes=64 * GIB, available_bytes=60 * GIB, disk_free_bytes=5 * GIB)
    mac = load_device_profile("m2-16gb")
    accelerator = device_accelerator(mac)
    assert (accelerator.device, accelerator.unified, accelerator.link_bytes_per_s) == ("mps", True, None)
    assert accelerator.rates is not None
    assert accelerator.rates.link_bytes_per_s == accelerator.rates.memory_bytes_per_s / 2
    assert device_host(mac, here) == Host(total_bytes=16 * GIB, available_bytes=16 * GIB, disk_free_bytes=5 * GIB)
    assert device_host(load_device_profile("rtx-4090"), here) == here


@every_device
def test_a_pipeline_is_planned_for_every_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "describe", described)
    profile = DEVICES[name]
    plan = vramplan.plan("stable-diffusion-1.5", device=name, simulate=False)
    budget = plan.machine.budget.vram_bytes
    assert budget is not None
    assert plan.projected.vram_reserved_bytes <= budget < profile.memory_bytes
    if profile.pool_bytes is not None:
        assert_shared(profile, plan)


described = cache(planning.describe)


def assert_shared(profile: DeviceProfile, plan: vramplan.Plan) -> None:
    """Nothing is moved about within one memory, and a fifth of it, at least 2 GiB, is left to the system."""
    assert set(plan.settings.placement.values()) == {"resident"}
    assert plan.machine.host.total_bytes == profile.pool_bytes
    assert [item for item in plan.machine.budget.deductions if item.name == "margin" and item.size_bytes >= 2 * GIB]
    assert [item for item in plan.refused if "shares one memory" in item.reason]
