"""The rates of an accelerator as measured: by `vramplan calibrate`, or else when it was detected."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from statistics import median
from typing import Any

from vramplan.calibration.records import ProbeRecord
from vramplan.calibration.store import read_store
from vramplan.hardware.measurements import kept_measurements
from vramplan.hardware.rates import WIDE_HEAD, Rates
from vramplan.hardware.types import Accelerator, Measurement

# The field of `ProbeRecord` for each measurement of one size.
_FIELDS = {
    "host_to_device_pinned": "pinned_to_device_bytes_per_s",
    "host_to_device_pageable": "pageable_to_device_bytes_per_s",
    "device_to_host": "device_to_pinned_bytes_per_s",
    "device_to_host_pageable": "device_to_pageable_bytes_per_s",
    "within_device": "memory_bytes_per_s",
    "launch": "launch_seconds",
    "disk_read": "disk_bytes_per_s",
}
# The name for people of each field of `Rates` that a measurement replaces.
_NAMES = {
    "link_bytes_per_s": "copies from page-locked memory",
    "pageable_bytes_per_s": "copies from pageable memory",
    "back_bytes_per_s": "copies back to pageable memory",
    "memory_bytes_per_s": "memory",
    "half_flops_per_s": "products",
    "reached": "products",
    "attention_share": "attention",
    "wide_attention_share": "attention",
    "launch_seconds": "kernel launches",
    "disk_bytes_per_s": "disk reads",
}


def probe_fields(measured: Iterable[Measurement]) -> dict[str, Any]:
    """The fields of `ProbeRecord` for these measurements; others, as of an edited machine file, are ignored."""
    sizes: dict[str, dict[str, float]] = {"product": {}, "attention": {}}
    found: dict[str, Any] = {}
    for item in measured:
        kind, _, rest = item.what.partition("_")
        size = rest.rpartition("_")[2]
        if item.what in _FIELDS:
            found[_FIELDS[item.what]] = item.median
        elif kind in sizes and size.isdigit():
            sizes[kind][size] = item.median
    if sizes["product"]:
        found |= {"product_flops_per_s": sizes["product"], "half_flops_per_s": max(sizes["product"].values())}
    return found | ({"attention_flops_per_s": sizes["attention"]} if sizes["attention"] else {})


def with_measured_rates(accelerator: Accelerator) -> Accelerator:
    """The accelerator of this machine with the rates measured on it; unchanged if there are none."""
    found = [item for item in read_store().records if isinstance(item, ProbeRecord) and item.device == accelerator.name]
    if found:
        return with_probe(accelerator, found[-1], f"measured on {found[-1].time[:10]}")
    return with_measurements(accelerator, kept_measurements(accelerator))


def with_measurements(accelerator: Accelerator, measured: Iterable[Measurement]) -> Accelerator:
    """The accelerator with rates from these measurements."""
    fields = probe_fields(measured)
    record = ProbeRecord(time="", device=accelerator.name, card=None, driver=None, versions={}, **fields)
    return with_probe(accelerator, record, "measured") if fields else accelerator


def with_probe(accelerator: Accelerator, probe: ProbeRecord, when: str) -> Accelerator:
    """The accelerator with the rates of this probe; `when` says in its source how they came about."""
    from vramplan.planner.clock import DEFAULT_RATES

    base = accelerator.rates or DEFAULT_RATES
    changes = _one_by_one(probe, profiled=accelerator.rates is not None)
    changes |= _shares(probe, replace(base, **changes), fused=accelerator.fuses_attention)
    if not changes:
        return accelerator
    names = tuple(dict.fromkeys(_NAMES[name] for name in changes))
    source = f"{base.source}; {when}: {', '.join(names)}"
    return replace(accelerator, rates=replace(base, **changes, measured=names, source=source))


def _one_by_one(probe: ProbeRecord, *, profiled: bool) -> dict[str, Any]:
    """The rates measured as they are. A profile's peaks of memory and products stay, as its shares are of those."""
    found = {
        "link_bytes_per_s": probe.pinned_to_device_bytes_per_s,
        "pageable_bytes_per_s": probe.pageable_to_device_bytes_per_s,
        "back_bytes_per_s": probe.device_to_pageable_bytes_per_s,
        "launch_seconds": probe.launch_seconds,
        "disk_bytes_per_s": probe.disk_bytes_per_s,
    }
    if not profiled:
        found |= {"memory_bytes_per_s": probe.memory_bytes_per_s, "half_flops_per_s": probe.half_flops_per_s}
    return {name: value for name, value in found.items() if value}


def _shares(probe: ProbeRecord, rates: Rates, *, fused: bool) -> dict[str, Any]:
    """The shares of the peak that products and attention reach.

    A pipeline's products reach less than one alone, so the measured ones are an upper bound: the median of their sizes,
    which is nearest to the layers of large pipelines. Attention is one kernel, and takes what was measured, unless the
    device holds the scores: those are priced as traffic.
    """
    found: dict[str, Any] = {}
    products = list(probe.product_flops_per_s.values()) or [probe.half_flops_per_s or rates.half_flops_per_s]
    reached = median(products) / rates.half_flops_per_s
    if reached < rates.reached:
        found["reached"] = reached
    peak = rates.half_flops_per_s * min(reached, rates.reached)
    for size, flops in probe.attention_flops_per_s.items():
        if flops and fused:
            found["wide_attention_share" if int(size) >= WIDE_HEAD else "attention_share"] = flops / peak
    return found
