"""The RAM of loading: one component at a time, each placed before the next is loaded.

Measured (diffusers 0.42, transformers 5.23): weights that keep their dtype stay in pages of their files, which the
system can reclaim; converted weights are memory of the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vramplan.pipeline.types import Component
from vramplan.strategies.base import Hold, Placement

# Memory of converting on the way to the device: four tensors at once (transformers 5.23, GLOBAL_WORKERS), and the share
# that the C library keeps after freeing. Measured: 0.64 GiB for 3.2 GiB, Stable Diffusion's UNet in float32 (glibc).
_TENSORS_AT_ONCE = 4
_KEPT_BY_MALLOC = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadDemand:
    """The peak of loading in RAM: while this component is loaded, after those before it.

    `order` lists all components in the order of loading; empty in plans written before it was recorded.
    """

    component: str
    ram_bytes: int
    order: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The loading of one component: its peak of RAM until it is placed, and its RAM from then on, in bytes.

    A `direct` one is loaded straight to the device. A `freed` one is dropped before others are loaded.
    """

    peak_bytes: int
    kept_bytes: int
    direct: bool
    freed: bool


def load_of(component: Component, setting: Placement, hold: Hold) -> Load:
    """Return the loading of a component under this setting."""
    size = component.weight_bytes
    kept = hold.host_bytes + hold.pinned_bytes
    direct = setting.direct and not component.cast_from_bytes
    own = max(component.cast_from_bytes, size) if component.converted_at_load else 0
    if component.cast_from_bytes:
        own = max(own, size)
    if direct:
        own = min(own, max(_TENSORS_AT_ONCE * component.geometry.largest_leaf_bytes, size // _KEPT_BY_MALLOC))
    return Load(peak_bytes=max(own, kept + hold.host_transient_bytes), kept_bytes=kept, direct=direct, freed=hold.freed)


def load_order(loads: Mapping[str, Load]) -> list[str]:
    """Return the components in the order that needs the least RAM: freed ones first, then by the RAM they give back
    after their peak, largest first; ties by name.
    """
    return sorted(
        loads, key=lambda name: (not loads[name].freed, loads[name].kept_bytes - loads[name].peak_bytes, name)
    )


def load_demand(loads: Mapping[str, Load]) -> LoadDemand | None:
    """Return the peak of loading in that order, None without components."""
    held, freed, peak = 0, True, None
    ordered = tuple(load_order(loads))
    for name in ordered:
        load = loads[name]
        if freed and not load.freed:
            held, freed = 0, False
        if peak is None or held + load.peak_bytes > peak.ram_bytes:
            peak = LoadDemand(component=name, ram_bytes=held + load.peak_bytes, order=ordered)
        held += load.kept_bytes
    return peak
