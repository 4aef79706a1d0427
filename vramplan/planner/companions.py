"""What the denoisers' companions may take beside them: every mix while there are few, one ladder at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.planner.demand import DEFAULT_RATES, DISK_BYTES_PER_S, PAUSE_SECONDS
from vramplan.strategies import Placement
from vramplan.strategies.base import Hold

Rungs = list[Placement]
Choices = Sequence[tuple[Component, Rungs]]

# Companions of the denoiser weigh on the choice one by one only while there are few of them.
_MOST_COMPANION_CHOICES = 512
# Rungs that a companion's ladder is thinned to where somebody else's takes up the room that is left.
_FEW_RUNGS = 3


def companion_pools(wanted: Choices, spec: PipelineSpec) -> list[tuple[list[list[Rungs]], list[list[Rungs]]]]:
    """What each companion may take beside denoisers on a ladder, and beside those whose setting stands alone."""
    apart = [(component, [setting for setting in usable if not setting.freed]) for component, usable in wanted]
    together = [_pool(pool, spec) for pool in _freeing(wanted)]
    most = _MOST_COMPANION_CHOICES - sum(prod(map(len, few)) for few, _ in together)
    return [_pool(apart, spec, most), *together]


def _pool(
    choices: Choices, spec: PipelineSpec, most: int = _MOST_COMPANION_CHOICES
) -> tuple[list[list[Rungs]], list[list[Rungs]]]:
    """Everybody's choices one by one, few of each ladder; and the same with the heaviest companion's whole ladders."""
    whole = [(component, _undominated(component, spec, usable)) for component, usable in choices]
    few = [[[rung] for rung in kept] for kept in _thinned([(part, _few_rungs(usable)) for part, usable in whole], most)]
    able = [place for place, (_, usable) in enumerate(whole) if any(len(rungs) > 1 for rungs in ladders_of(usable))]
    climber = max(able, key=lambda place: (whole[place][0].weight_bytes, whole[place][0].name), default=None)
    every = [ladders_of(whole[place][1]) if place == climber else kept for place, kept in enumerate(few)]
    return few, every


def _freeing(wanted: Choices) -> Iterable[Choices]:
    """For each setting that frees: every component of a role under it, and the choices of all others."""
    settings = dict.fromkeys(setting for _, usable in wanted for setting in usable if setting.freed)
    for freeing in settings:
        role = next(component.role for component, usable in wanted if freeing in usable)
        if all(freeing in usable for component, usable in wanted if component.role == role):
            yield [
                (component, [freeing] if component.role == role else [s for s in usable if not s.freed])
                for component, usable in wanted
            ]


def ladders_of(settings: Sequence[Placement]) -> list[Rungs]:
    """Settings that follow each other on one ladder together, each other one by itself."""
    found: list[Rungs] = []
    for setting in settings:
        if setting.ladder and found and found[-1][0].ladder == setting.ladder:
            found[-1].append(setting)
        else:
            found.append([setting])
    return found


def _few_rungs(settings: Sequence[Placement]) -> Rungs:
    """The settings, with `_FEW_RUNGS` of each ladder that has more: those in the middle of as many equal parts."""
    few, found = _FEW_RUNGS, ladders_of(settings)
    kept = (
        [rungs[(2 * k + 1) * len(rungs) // (2 * few)] for k in range(few)] if len(rungs) > few else rungs
        for rungs in found
    )
    return [rung for rungs in kept for rung in rungs]


def _undominated(component: Component, spec: PipelineSpec, settings: Sequence[Placement]) -> list[Placement]:
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
    moved = hold.moved_in_bytes + hold.moved_out_bytes + hold.waited_bytes
    seconds = moved / (DEFAULT_RATES.link_bytes_per_s * hold.rate) + hold.pauses * PAUSE_SECONDS
    seconds += hold.disk_bytes / DISK_BYTES_PER_S
    ram = hold.host_bytes + hold.pinned_bytes + hold.host_transient_bytes
    return hold.running_bytes, hold.idle_bytes, ram, hold.disk_bytes, float(f"{seconds:.2g}")


def _thinned(choices: Choices, most: int = _MOST_COMPANION_CHOICES) -> list[list[Placement]]:
    """At most so many mixes: the lightest companions keep only their first and their smallest choice, where needed."""
    kept = [options for _, options in choices]
    for place in sorted(range(len(choices)), key=lambda place: choices[place][0].weight_bytes):
        if prod(map(len, kept)) <= most:
            break
        kept[place] = kept[place][:1] + kept[place][-1:] if len(kept[place]) > 1 else kept[place]
    return kept
