"""What loading takes of RAM: one component at a time, each placed before the next is loaded.

Measured (diffusers 0.42, transformers 5.23): weights that keep their dtype stay in pages of their files, which the
system takes back when it needs them; weights that are converted are memory of the process's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vramplan.pipeline.types import Component
from vramplan.strategies.base import Hold, Placement

# What converting on the way to the device takes: four tensors at once (transformers 5.23, GLOBAL_WORKERS), and what the
# C library keeps of those it freed. Measured: 0.64 GiB for the 3.2 GiB of Stable Diffusion's UNet in float32 (glibc).
_TENSORS_AT_ONCE = 4
_KEPT_BY_MALLOC = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadDemand:
    """The highest moment of loading in RAM: while this component is loaded, beside what was loaded before.

    `order` are all components in the order they are loaded; empty in plans of before it was kept.
    """

    component: str
    ram_bytes: int
    order: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One component's loading: the most RAM it takes until it is placed, and what it keeps from then on, in bytes.

    `direct` is one that is loaded straight to the device. One that is `freed` is gone before others are loaded.
    """

    peak_bytes: int
    kept_bytes: int
    direct: bool
    freed: bool


def load_of(component: Component, setting: Placement, hold: Hold) -> Load:
    """How a component that is not loaded yet is loaded under this setting."""
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
    """The components in the order that needs the least RAM: those first that are freed, then those that give back most.
    Of those alike the first by name, in whatever order they are listed.

    Loading one after another, each with a peak of which it keeps a part, is lowest in the order of what they give back.
    """
    return sorted(
        loads, key=lambda name: (not loads[name].freed, loads[name].kept_bytes - loads[name].peak_bytes, name)
    )


def load_demand(loads: Mapping[str, Load]) -> LoadDemand | None:
    """The highest moment of loading in that order, None where there is nothing to load."""
    held, freed, highest = 0, True, None
    ordered = tuple(load_order(loads))
    for name in ordered:
        load = loads[name]
        if freed and not load.freed:
            held, freed = 0, False
        if highest is None or held + load.peak_bytes > highest.ram_bytes:
            highest = LoadDemand(component=name, ram_bytes=held + load.peak_bytes, order=ordered)
        held += load.kept_bytes
    return highest
