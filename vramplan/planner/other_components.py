"""What the denoisers' companions may take beside them: every mix while there are few, thinned where there are many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod

from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.planner import times
from vramplan.planner.clock import DEFAULT_RATES
from vramplan.strategies import Placement
from vramplan.strategies.base import Hold

PlacementList = list[Placement]
ComponentChoices = Sequence[tuple[Component, PlacementList]]
Axes = tuple[tuple[dict[str, Placement], ...], ...]

# As many mixes are looked at beside each setting of the denoiser: some 100 of those make arrays of a few megabytes.
MOST_MIXES = 4096
# What a long ladder is thinned to, one after the other, where there are more mixes.
_FEWER_RUNGS = (8, 3)


def other_placements(wanted: ComponentChoices, spec: PipelineSpec) -> list[Axes]:
    """What each companion may take: every mix of those that stay, and every mix beside each way of encoding first."""
    apart = [(component, [setting for setting in usable if not setting.freed]) for component, usable in wanted]
    return [_axes(choices, spec) for choices in (apart, *_freeing(wanted))]


def _axes(choices: ComponentChoices, spec: PipelineSpec) -> Axes:
    kept = _thinned([(component, _undominated(component, spec, usable)) for component, usable in choices])
    return tuple(
        tuple({component.name: setting} for setting in settings)
        for (component, _), settings in zip(choices, kept, strict=True)
    )


def _freeing(wanted: ComponentChoices) -> Iterable[ComponentChoices]:
    """For each setting that frees: every component of a role under it, and the choices of all others."""
    settings = dict.fromkeys(setting for _, usable in wanted for setting in usable if setting.freed)
    for freeing in settings:
        role = next(component.role for component, usable in wanted if freeing in usable)
        if all(freeing in usable for component, usable in wanted if component.role == role):
            yield [
                (component, [freeing] if component.role == role else [s for s in usable if not s.freed])
                for component, usable in wanted
            ]


def ladders_of(settings: Sequence[Placement]) -> list[PlacementList]:
    """Settings that follow each other on one ladder together, each other one by itself."""
    found: list[PlacementList] = []
    for setting in settings:
        if setting.ladder and found and found[-1][0].ladder == setting.ladder:
            found[-1].append(setting)
        else:
            found.append([setting])
    return found


def _undominated(component: Component, spec: PipelineSpec, settings: Sequence[Placement]) -> PlacementList:
    """Those that no other beats: by what is on the device, in RAM and on disk, and by the time moving it takes.

    Times are equal up to their second digit; of equals the first is kept.
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
    """What a setting takes of each thing there is a budget of, and of time by the rates of a common card."""
    seconds = times.moving(hold, 1.0, DEFAULT_RATES) + times.hooks(hold, 1.0, DEFAULT_RATES)
    ram = hold.host_bytes + hold.pinned_bytes + hold.host_transient_bytes
    return hold.running_bytes, hold.idle_bytes, ram, hold.disk_bytes, float(f"{seconds:.2g}")


def _thinned(choices: ComponentChoices) -> list[PlacementList]:
    """At most `MOST_MIXES`, the lightest companions thinned first: their ladders, then all but their two ends."""
    kept = [settings for _, settings in choices]
    lightest = sorted(range(len(choices)), key=lambda place: choices[place][0].weight_bytes)
    steps: list[Callable[[PlacementList], PlacementList]] = [partial(_fewer_rungs, most=most) for most in _FEWER_RUNGS]
    for thin in (*steps, _ends):
        for place in lightest:
            if prod(map(len, kept)) <= MOST_MIXES:
                return kept
            kept[place] = thin(kept[place])
    return kept


def _fewer_rungs(settings: PlacementList, most: int) -> PlacementList:
    """The settings, with `most` of each ladder that has more: those in the middle of as many equal parts."""
    kept = (
        [rungs[(2 * part + 1) * len(rungs) // (2 * most)] for part in range(most)] if len(rungs) > most else rungs
        for rungs in ladders_of(settings)
    )
    return [rung for rungs in kept for rung in rungs]


def _ends(settings: PlacementList) -> PlacementList:
    """The first and the smallest."""
    return settings[:1] + settings[-1:] if len(settings) > 1 else settings
