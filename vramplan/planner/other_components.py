"""Placements for the components other than denoisers: every combination, thinned if there are too many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.planner import times
from vramplan.planner.clock import DEFAULT_RATES
from vramplan.strategies import Placement
from vramplan.strategies.base import Hold

PlacementList = list[Placement]
ComponentChoices = Sequence[tuple[Component, PlacementList]]
Axes = tuple[tuple[dict[str, Placement], ...], ...]

# The most combinations per setting of the denoiser: with some 100 of those, arrays take a few megabytes.
MOST_COMBINATIONS = 4096


def other_placements(wanted: ComponentChoices, spec: PipelineSpec) -> list[Axes]:
    """Return the choices of each component, without encoding first, and with each way of encoding first."""
    kept = [(component, [setting for setting in usable if not setting.freed]) for component, usable in wanted]
    return [_axes(choices, spec) for choices in (kept, *_encoding_first(wanted))]


def _axes(choices: ComponentChoices, spec: PipelineSpec) -> Axes:
    kept = _thinned([(component, _undominated(component, spec, usable)) for component, usable in choices])
    return tuple(
        tuple({component.name: setting} for setting in settings)
        for (component, _), settings in zip(choices, kept, strict=True)
    )


def _encoding_first(wanted: ComponentChoices) -> Iterable[ComponentChoices]:
    """For each setting that frees: assign it to every component of its role, and keep the choices of the others."""
    settings = dict.fromkeys(setting for _, usable in wanted for setting in usable if setting.freed)
    for freeing in settings:
        role = next(component.role for component, usable in wanted if freeing in usable)
        if all(freeing in usable for component, usable in wanted if component.role == role):
            yield [
                (component, [freeing] if component.role == role else [s for s in usable if not s.freed])
                for component, usable in wanted
            ]


def _undominated(component: Component, spec: PipelineSpec, settings: Sequence[Placement]) -> PlacementList:
    """Return the settings that no other dominates in device memory, RAM, disk, and transfer time.

    Times are equal up to their second digit; of ties the first is kept.
    """
    costs = [_costs(setting.hold(component, spec)) for setting in settings]
    return [
        setting
        for place, (setting, cost) in enumerate(zip(settings, costs, strict=True))
        if not any(
            all(one <= two for one, two in zip(other, cost, strict=True)) and (other != cost or before < place)
            for before, other in enumerate(costs)
            if before != place
        )
    ]


def _costs(hold: Hold) -> tuple[float, ...]:
    """Return the bytes of each budgeted memory, and the transfer time at the rates of a common card."""
    seconds = times.moving(hold, 1.0, DEFAULT_RATES) + times.hooks(hold, 1.0, DEFAULT_RATES)
    ram = hold.host_bytes + hold.pinned_bytes + hold.host_transient_bytes
    return hold.running_bytes, hold.idle_bytes, ram, hold.disk_bytes, float(f"{seconds:.2g}")


def _thinned(choices: ComponentChoices) -> list[PlacementList]:
    """Thin to `MOST_COMBINATIONS`: the lightest components first, to the two ends of their settings."""
    kept = [settings for _, settings in choices]
    for place in sorted(range(len(choices)), key=lambda place: choices[place][0].weight_bytes):
        if prod(map(len, kept)) <= MOST_COMBINATIONS:
            break
        kept[place] = _ends(kept[place])
    return kept


def _ends(settings: PlacementList) -> PlacementList:
    """Return the first and the last setting."""
    return settings[:1] + settings[-1:] if len(settings) > 1 else settings
