"""The candidates of weight streaming: how many blocks of each component are kept, cached and streamed, and page-locked.

The table of their prices is solved exactly: every number of streamed blocks of the denoiser that saves memory, with
numbers of kept and page-locked ones at levels that are as fine as the size of the table allows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain, combinations, islice
from math import prod

from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.planner.fixed import Fixed
from vramplan.planner.pool import CandidatePool, ComponentPlacements
from vramplan.strategies.base import Placement
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.resident import Resident
from vramplan.strategies.weight_streaming import LEAST_STREAMED, WeightStreaming, streaming_sizes
from vramplan.streaming.division import totals, worth_streaming
from vramplan.units import GIB, MIB

# The most candidates of the table: some 20 arrays of that length take 30 MB and a tenth of a second.
_MOST = 200_000
# Numbers of levels, tried in turn until the table is small enough.
_FINENESS = (64, 12, 6, 3, 2)
# The number of levels of kept blocks where a denoiser is solved for alone; `with_more_kept` fills what they leave.
_FINER = 12
# RAM beside the weights: buffers that copies pass through, and rounding of page-locked chunks.
_BESIDE = 192 * MIB

Allowed = Callable[[Component, Placement], bool]


def streaming_pool(
    spec: PipelineSpec, fixed: Fixed, allowed: Allowed, denoisers: Sequence[Component], ram_bytes: int | None
) -> CandidatePool | None:
    """Return all candidates with streamed weights, None if there are none. `ram_bytes` may be used, None for plenty."""
    if fixed.everywhere is not None and not isinstance(fixed.everywhere, WeightStreaming):
        return None
    streamable = {
        component.name: component
        for component in spec.components
        if _is_open(component, fixed) and allowed(component, WeightStreaming())
    }
    settled = {component.name: _settled(component, fixed, allowed) for component in spec.components}
    if not any(streamable) and not any(isinstance(s, WeightStreaming) for several in settled.values() for s in several):
        return None
    levels = _ram_levels(list(streamable.values()), denoisers, ram_bytes)
    axes: list[tuple[ComponentPlacements, ...]] = []
    for fineness in _FINENESS:
        axes = []
        for group in reversed(_groups(spec, denoisers)):  # the denoiser, which has most settings, last
            first = group[0]
            found: Iterable[Placement] = settled[first.name]
            if first.name in streamable:
                leading = first.name == denoisers[0].name
                found = chain(found, _options(first, fineness, levels, leading=leading, between=fineness))
            if fineness != _FINENESS[-1]:  # no more than show that there are too many
                found = islice(found, _MOST // max(1, prod(map(len, axes))) + 1)
            axes.insert(0, tuple({member.name: setting for member in group} for setting in dict.fromkeys(found)))
        if prod(map(len, axes)) <= _MOST:
            break
    axes = _cut(axes, spec)
    return CandidatePool(axes=tuple(axes)) if all(axes) else None


def _is_open(component: Component, fixed: Fixed) -> bool:
    """Whether the planner chooses the numbers: nothing is fixed, or weight streaming without numbers."""
    given = fixed.placement.get(component.name, fixed.everywhere)
    return given is None or given == WeightStreaming()


def _settled(component: Component, fixed: Fixed, allowed: Allowed) -> list[Placement]:
    """The placements beside open streaming: the fixed one; else resident, and for a VAE, which streaming does not cut,
    leaf by leaf."""
    given = fixed.placement.get(component.name)
    if given == WeightStreaming() or (given is None and fixed.everywhere is not None):
        return []
    leaves = [GroupOffload(type="leaf")] if component.role == "vae" else []
    wanted: list[Placement] = [Resident(), *leaves] if given is None else [given]
    return [setting for setting in wanted if not setting.freed and allowed(component, setting)]


def _groups(spec: PipelineSpec, denoisers: Sequence[Component]) -> list[list[Component]]:
    """Each component for itself, but denoisers of equal blocks together, the first denoiser first."""
    found: list[list[Component]] = []
    others = [component for component in spec.components if component not in denoisers]
    for component in (*denoisers, *others):
        same = [
            group for group in found if component in denoisers and group[0].geometry.units == component.geometry.units
        ]
        if same:
            same[0].append(component)
        else:
            found.append([component])
    return found


def _options(
    component: Component, fineness: int, levels: Sequence[int | None], *, leading: bool, between: int
) -> Iterable[WeightStreaming]:
    """The settings of one component; those of the leading denoiser with every useful number of streamed blocks.

    What runs once in a call passes through, or stays for its phase; keeping some of its blocks saves copying those.
    """
    sizes = streaming_sizes(component)
    counts: Sequence[int] = _stream_counts(sizes)
    if component.role in ("denoiser", "control"):
        counts = counts if leading else _spread(counts, fineness)
        pairs = [(count, keep) for count in counts for keep in _spread(range(len(sizes) - count + 1), fineness)]
    else:
        keeps = _spread(range(max(0, counts[-1] - LEAST_STREAMED) + 1), fineness)
        pairs = [(0, keep) for keep in _spread(range(len(sizes) + 1), fineness)]
        pairs += [(counts[-1] - keep, keep) for keep in reversed(keeps) if counts[-1]]
    for count, keep in pairs:
        if count or keep < len(sizes) or not sizes:  # else it is resident
            for locked in _locked(component, sizes, count, keep, levels, between):
                yield WeightStreaming(streamed=count, keep=keep, locked=locked)


@lru_cache(maxsize=64)
def _stream_counts(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of streamed blocks worth trying, from none on: each saves more memory than those before.

    If blocks differ in size, streaming more of them may save less, or move more for the same: those are left out.
    """
    found = [(0, 0, 0)]
    for count in range(LEAST_STREAMED, len(worth_streaming(sizes)) + 1):
        total = totals(sizes, count)
        found.append((total.streamed[-1] - total.slots, -total.streamed[-1], -count))
    counts, least = [], None
    for saved, moved, count in sorted(found, reverse=True):
        if saved >= 0 and (least is None or moved > least):
            counts.append(-count)
            least = moved
    return tuple(counts[::-1])


def _locked(
    component: Component, sizes: tuple[int, ...], streamed: int, keep: int, levels: Sequence[int | None], between: int
) -> list[int]:
    """The numbers of page-locked blocks worth trying: all; with little RAM as many as fit into each level of it too,
    and some in between. The weights outside of blocks come first."""
    if not sizes:
        return [1] if levels == [None] else [1, 0]
    total = totals(sizes, streamed)
    rest = 0 if keep else component.weight_bytes - sum(sizes)
    most = max(1, len(sizes) - keep)
    found = {most if level is None else max(0, total.lockable(level - rest, keep)) for level in levels}
    return sorted(found | set(_spread(range(most + 1), between) if levels != [None] else ()), reverse=True)


def _ram_levels(
    components: Sequence[Component], denoisers: Sequence[Component], ram_bytes: int | None
) -> list[int | None]:
    """The amounts of RAM to lock a component's weights in: all that is needed (None), or what others leave of it."""
    needed = sum(component.weight_bytes for component in components)
    if ram_bytes is None or needed + _BESIDE <= ram_bytes:
        return [None]
    others = [component.weight_bytes for component in components if component not in denoisers]
    taken = {sum(chosen) for count in range(len(others) + 1) for chosen in combinations(others, count)}
    left = sorted({max(0, ram_bytes - _BESIDE - size) for size in taken}, reverse=True)
    return [None, *dict.fromkeys([*left, *(size * 3 // 4 for size in left[:1]), *(size // 2 for size in left[:1]), 0])]


def _cut(axes: Sequence[tuple[ComponentPlacements, ...]], spec: PipelineSpec) -> list[tuple[ComponentPlacements, ...]]:
    """Leave the lightest components the two ends of their settings, resident and passing through, as far as needed."""
    kept = list(axes)
    sizes = [sum(spec.component(name).weight_bytes for name in axis[0]) if axis else 0 for axis in axes]
    for place in sorted(range(len(axes)), key=sizes.__getitem__):
        if prod(map(len, kept)) > _MOST:
            kept[place] = (kept[place][0], kept[place][-1])
    return kept


def _spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values, spread evenly, both ends included."""
    if len(values) <= most:
        return list(values)
    return [values[number * (len(values) - 1) // (most - 1)] for number in range(most)]


def with_finer_numbers(
    placement: Mapping[str, Placement],
    spec: PipelineSpec,
    fixed: Fixed,
    ram_bytes: int,
    best: Callable[[CandidatePool], Mapping[str, Placement]],
) -> Mapping[str, Placement]:
    """Solve for the numbers of one component after another, the others as they are: with little RAM the levels leave
    most numbers out. `best` returns the best of a pool."""
    found = placement
    denoisers = [component for component in spec.components if component.role in ("denoiser", "control")]
    others = [component for component in spec.components if component not in denoisers]
    for component in (*denoisers, *others, *denoisers):
        setting = found.get(component.name)
        if not isinstance(setting, WeightStreaming) or not _is_open(component, fixed):
            continue
        holds = {other.name: found[other.name].hold(other, spec) for other in spec.components if other is not component}
        left = ram_bytes - sum(hold.host_bytes + hold.pinned_bytes for hold in holds.values())
        left -= max((hold.shared_pinned_bytes for hold in holds.values()), default=0)
        levels = [max(0, left - beside) for beside in (0, _BESIDE, _BESIDE + GIB)]
        if component.weight_bytes <= levels[-1]:
            continue  # all of it may be page-locked
        fineness = _FINER if component in denoisers else _FINENESS[0]
        settings = [setting, *_options(component, fineness, levels, leading=True, between=2)]
        axes = [({other: found[other]},) for other in holds]
        found = best(CandidatePool(axes=(tuple({component.name: each} for each in settings), *axes)))
    return found


def with_more_kept(
    placement: Mapping[str, Placement],
    spec: PipelineSpec,
    fixed: Fixed,
    fits: Callable[[Mapping[str, Placement]], bool],
    seconds: Callable[[Mapping[str, Placement]], float],
) -> Mapping[str, Placement]:
    """Keep as many more blocks of each component as `fits` allows: levels leave numbers out. The denoisers come first,
    or last where that takes fewer `seconds`: what one component keeps, another may not."""
    more = {
        component.name: able
        for component in sorted(spec.components, key=lambda component: component.role not in ("denoiser", "control"))
        if isinstance(setting := placement[component.name], WeightStreaming)
        and _is_open(component, fixed)
        and len(able := _keeping_more(setting, component)) > 1
    }
    found = []
    for names in dict.fromkeys((tuple(more), tuple(reversed(more)))):
        filled = dict(placement)
        for name in names:
            most = bisect_left(more[name], True, key=partial(_too_many, filled, name, fits))
            filled[name] = more[name][max(0, most - 1)]
        found.append(filled)
    return min(found, key=seconds) if len(found) > 1 else found[0]


def _too_many(
    placement: Mapping[str, Placement],
    name: str,
    fits: Callable[[Mapping[str, Placement]], bool],
    setting: WeightStreaming,
) -> bool:
    return not fits({**placement, name: setting})


def _keeping_more(setting: WeightStreaming, component: Component) -> list[WeightStreaming]:
    """The setting with ever more kept blocks, which need no copy in host memory: cached ones at first, then, of a
    component that passes through, streamed ones."""
    count = len(streaming_sizes(component))
    pairs = [(setting.streamed, keep) for keep in range(setting.keep, count - setting.streamed + 1)]
    if component.role not in ("denoiser", "control"):
        streamed, keep = pairs[-1]
        pairs += [(streamed - number, keep + number) for number in range(1, streamed - LEAST_STREAMED + 1)]
        pairs += [(0, number) for number in range(pairs[-1][1] + 1, count)]
    return [
        WeightStreaming(streamed=streamed, keep=keep, locked=min(setting.locked, count - keep))
        for streamed, keep in pairs
        if streamed or keep < count or not count  # else it is resident
    ]
