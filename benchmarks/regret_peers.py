"""What other tools would choose for a pipeline within a budget: rules written after reading them, none of their code.

* mmgp 3.8 (`offload.profile` 1 to 5, its README): fixed budgets for each model, one model on the device at a time,
  blocks streamed from pinned RAM. Its default of quantising the transformer is left out: all compared is lossless.
* diffusers 0.42, `ComponentsManager.enable_auto_cpu_offload`: whole components stay until another one needs their
  room, then the smallest sufficient combination leaves; 3 GB are kept free for everything else.
* diffusers-mm 0.4 (`managed(pipe)`, strategy auto): a ladder of resident, pinned blocks, model offload and leaves, with
  a working set of 8 GiB where no workload was recorded, as by default.
* AirCanvas 0.1 and diffusers-dynamic-offloader 0.1: `regret_streamers.py`.

What a rule places is priced with this project's own prices, so that only the choices are compared: no tool copies
faster than large page-locked blocks are copied, whatever it copies. None but AirCanvas chooses how the VAE decodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from regret_asked import Asked, Choice, Held, Rule, mixed_rate
from regret_streamers import aircanvas, dynamic_offloader

from vramplan.pipeline.types import Component
from vramplan.strategies.base import Hold
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.model_cpu_offload import ModelCpuOffload
from vramplan.strategies.resident import Resident
from vramplan.strategies.weight_streaming import WeightStreaming
from vramplan.units import GIB, MIB

# mmgp: the part of all VRAM that weights may take, and of all RAM that may be pinned.
_MMGP_VRAM_SHARE, _MMGP_PINNED_SHARE = 0.8, 0.5
_MMGP_BUDGETS_MIB: Mapping[int, Mapping[str, int]] = {
    1: {},
    2: {"transformer": 1200, "*": 3000},
    3: {},
    4: {"transformer": 1200, "*": 3000},
    5: {"transformer": 400, "*": 3000},
}
_COMPONENTS_MANAGER_MARGIN = 3 * 10**9
# diffusers-mm: what it takes activations for where nobody told a workload, times its safety factor, and its headroom.
_MM_WORKING_SET = int((4.0 * 1.5 + 2.0) * GIB)
_MM_MODEL_OFFLOAD_FACTOR, _MM_LEAST_BLOCKS, _MM_RAM_HEADROOM = 1.5, 8, 16 * GIB


# ---- mmgp


def mmgp(number: int) -> Rule:
    """The rule of one of its profiles."""

    def rule(asked: Asked) -> Choice:
        components = asked.spec.components
        pinned = [c for c in components if number in (1, 2) or (number in (3, 4) and c.name == "transformer")]
        to_pin = sum(component.weight_bytes for component in pinned)
        share = min(1.0, _MMGP_PINNED_SHARE * asked.budget.ram_bytes / max(1, to_pin))
        limits = {c.name: _mmgp_limit(c, number, asked.vram) for c in components}
        holds = {c.name: _mmgp_hold(c, limits[c.name], share if c in pinned else 0.0) for c in components}
        return Choice(
            priced={name: Held(held=hold) for name, hold in holds.items()},
            runs_as={c.name: asked.within(c, holds[c.name].running_bytes) for c in components},
        )

    return rule


def _mmgp_limit(component: Component, number: int, vram: int) -> int:
    """What the component may take of the device while it runs; 0 where it comes whole."""
    told = _MMGP_BUDGETS_MIB[number]
    limit = told.get(component.name, told.get("*", 0)) * MIB
    limit = 0 if limit > component.weight_bytes else limit
    most = int(_MMGP_VRAM_SHARE * vram)
    return most if limit > most or (not limit and component.weight_bytes > most) else limit


def _mmgp_hold(component: Component, limit: int, pinned_share: float) -> Hold:
    """Whole on demand, or a base, evenly spread blocks that stay, and two blocks in flight. Nothing is copied back."""
    size = component.weight_bytes
    pinned = int(size * pinned_share)
    rate = mixed_rate(pinned_share)
    if not limit:
        # not `pageable`: mmgp only drops a component that leaves, and nothing is copied back
        host = size - pinned
        return Hold(running_bytes=size, lingers=True, pinned_bytes=pinned, host_bytes=host, rate=rate, flat=True)
    lists = component.geometry.block_lists or ((component.geometry.largest_leaf_bytes,),)
    largest = max(map(max, lists))
    base = component.geometry.rest_bytes if component.geometry.block_lists else 0
    kept = _mmgp_kept(lists, limit - base)
    moved = max(0, size - base - kept)
    return Hold(
        running_bytes=min(size, base + kept + 2 * largest),
        lingers=True,
        pinned_bytes=pinned,
        host_bytes=size - pinned,
        moved_in_bytes=moved,
        overlapped=True,
        pauses=moved // largest,
        rate=rate,
    )


def _mmgp_kept(lists: Sequence[Sequence[int]], room: int) -> int:
    """Bytes of the blocks that stay: each list has its share of what two blocks of each leave."""
    room -= sum(2 * max(sizes) for sizes in lists)
    total = sum(map(sum, lists))
    return sum(int(sum(sizes) / total * max(0, room) / max(sizes)) * max(sizes) for sizes in lists)


# ---- ComponentsManager


def components_manager(asked: Asked) -> Choice:
    """Components that stay through a second call are resident, the others come and go whole."""
    swapped = _swapped(asked)
    components = asked.spec.components
    return Choice(
        priced={c.name: _on_demand(c) if c.name in swapped else Resident() for c in components},
        runs_as={c.name: WeightStreaming() if c.name in swapped else Resident() for c in components},
    )


def _on_demand(component: Component) -> Held:
    size = component.weight_bytes
    return Held(held=Hold(running_bytes=size, lingers=True, host_bytes=size, pageable=True))


def _swapped(asked: Asked) -> set[str]:
    """The components sent back during the second of two calls."""
    sizes = {component.name: component.weight_bytes for component in asked.spec.components}
    present: set[str] = set()
    cached = 0  # what the allocator keeps of earlier activations until something is sent back
    sent: set[str] = set()
    for call in (1, 2):
        for use in asked.spec.uses:
            if use.component not in present:
                free = asked.vram - sum(sizes[name] for name in present) - cached - _COMPONENTS_MANAGER_MARGIN
                leaving = _leaving({name: sizes[name] for name in present}, sizes[use.component] - free)
                sent |= leaving if call == 2 else set()
                present = (present - leaving) | {use.component}
                cached = 0 if leaving else cached
            cached = max(cached, asked.footprint.activation(use, ()).reserved_bytes)
    return sent


def _leaving(present: Mapping[str, int], needed: int) -> set[str]:
    """The smallest sufficient combination; all of them where none is."""
    if needed < 0 or not present:
        return set()
    mixes = [mix for count in range(1, len(present) + 1) for mix in combinations(present, count)]
    enough = [mix for mix in mixes if sum(present[name] for name in mix) >= needed]
    return set(min(enough, key=lambda mix: sum(present[name] for name in mix), default=tuple(present)))


# ---- diffusers-mm


def diffusers_mm(asked: Asked) -> Choice | None:
    """Its ladder, first match wins."""
    spec, vram = asked.spec, asked.vram
    sizes = [component.weight_bytes for component in spec.components]
    denoisers = asked.denoisers
    if sum(sizes) + _MM_WORKING_SET <= vram:
        return asked.everywhere(Resident())
    blocks = max((len(_mm_blocks(component)) for component in denoisers), default=0)
    listed = blocks >= _MM_LEAST_BLOCKS
    if listed and max(sizes) * (1 + 1 / blocks) + _MM_WORKING_SET <= vram:
        return _mm_pinned(asked)
    together = sum(component.weight_bytes for component in denoisers)
    if len(denoisers) < 2 and max(together, *sizes) * _MM_MODEL_OFFLOAD_FACTOR <= vram:
        return asked.everywhere(ModelCpuOffload())
    return _mm_pinned(asked) if listed else _mm_leaves(asked)


def _mm_blocks(component: Component) -> Sequence[int]:
    """Its largest list of blocks; it looks at direct children only."""
    lists = () if component.geometry.block_modules else component.geometry.block_lists
    return max(lists, key=sum, default=())


def _mm_leaf(asked: Asked) -> GroupOffload:
    """Leaves with a stream, pinned on the fly where RAM does not hold everything and 16 GiB more."""
    low = asked.budget.ram_bytes < asked.spec.weight_bytes + _MM_RAM_HEADROOM
    return GroupOffload(type="leaf", stream=True, low_cpu_mem_usage=low)


def _mm_leaves(asked: Asked) -> Choice:
    return Choice(
        priced=dict.fromkeys((c.name for c in asked.spec.components), _mm_leaf(asked)),
        runs_as={c.name: asked.leaves(c) for c in asked.spec.components},
    )


def _mm_pinned(asked: Asked) -> Choice:
    """The first blocks of the denoiser stay, the rest of it is streamed by leaves, as is everything else."""
    holds = {c.name: _mm_pin(asked, c) for c in asked.denoisers}
    others = [c for c in asked.spec.components if c.name not in holds]
    runs_as = {c.name: asked.leaves(c) for c in others}
    for component in asked.denoisers:
        hold = holds[component.name]
        runs_as[component.name] = asked.within(component, hold.running_bytes, stays=not hold.lingers)
    leaves = dict.fromkeys((c.name for c in others), _mm_leaf(asked))
    return Choice(priced={**leaves, **{name: Held(held=hold) for name, hold in holds.items()}}, runs_as=runs_as)


def _mm_pin(asked: Asked, component: Component) -> Hold:
    """As many blocks as fit beside the rest, one block in flight and the working set.

    Where less than the working set is left beside them, they leave for others and come back once in a call.
    """
    size, blocks = component.weight_bytes, _mm_blocks(component)
    rest = size - sum(blocks)
    one = blocks[0] if blocks else 1
    kept = min(len(blocks), max(0, (asked.vram - rest - _MM_WORKING_SET - one) // one))
    moved = sum(blocks[kept:])
    leaf = _mm_leaf(asked).hold(component, asked.spec)
    share = moved / size
    evicted = asked.vram - (size - moved) < _MM_WORKING_SET
    return Hold(
        running_bytes=size - moved + (2 * component.geometry.largest_leaf_bytes if moved else 0),
        idle_bytes=0 if evicted else size - moved,
        lingers=evicted,
        host_bytes=int(leaf.host_bytes * share) + (size - moved if evicted else 0),
        pinned_bytes=int(leaf.pinned_bytes * share),
        moved_in_bytes=moved,
        overlapped=True,
        pauses=int(leaf.pauses * share),
        rate=leaf.rate,
        unhidden=leaf.unhidden,
    )


PEERS: Mapping[str, Rule] = {
    **{f"mmgp profile {number}": mmgp(number) for number in _MMGP_BUDGETS_MIB},
    "ComponentsManager": components_manager,
    "diffusers-mm auto": diffusers_mm,
    "AirCanvas": aircanvas,
    "diffusers-dynamic-offloader auto": dynamic_offloader(profiled=False),
    "diffusers-dynamic-offloader, profiled": dynamic_offloader(profiled=True),
}
# Rules that take an amount of VRAM from their user: it is lowered until the choice fits.
TOLD = ("AirCanvas",)
