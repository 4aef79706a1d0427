"""What other tools would choose for a pipeline within a budget: rules written after reading them, none of their code.

* mmgp 3.8 (`offload.profile` 1 to 5, its README): fixed budgets for each model, one model on the device at a time,
  blocks streamed from pinned RAM. Its default of quantising the transformer is left out: all compared is lossless.
* diffusers 0.42, `ComponentsManager.enable_auto_cpu_offload`: whole components stay until another one needs their
  room, then the smallest sufficient combination leaves; 3 GB are kept free for everything else.
* diffusers-mm 0.4 (`managed(pipe)`, strategy auto): a ladder of resident, pinned blocks, model offload and leaves, with
  a working set of 8 GiB where no workload was recorded, as by default.

None of the three chooses how the VAE decodes. What a rule places is priced with this project's own prices, so that only
the choices are compared. What it has on the device, and when, can also be put on a pipeline (`OneAtATime`), to be run
on a simulated device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.strategies.partial_residency import PartialResidency

from vramplan.hardware.types import Accelerator, Budget
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.planner.footprint import Footprint
from vramplan.strategies import Placement
from vramplan.strategies.base import Hold, Quality
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.model_cpu_offload import ModelCpuOffload
from vramplan.strategies.resident import Resident
from vramplan.units import GIB, MIB

if TYPE_CHECKING:
    import torch

# mmgp: the part of all VRAM that weights may take, and of all RAM that may be pinned.
_PAGEABLE_RATE = 0.5  # copies from pageable memory, of the pinned rate
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A placement known by its hold alone: it can be priced, not applied."""

    held: Hold
    name = "peer"
    direct = False
    quality: Quality = "lossless"

    def hold(self, component: Component, spec: PipelineSpec) -> Hold:
        return self.held


@cache
def _code() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


@dataclass(frozen=True, slots=True, kw_only=True)
class OneAtATime:
    """A whole pipeline as a tool has it: what leaves the device when another component runs, and what is streamed.

    `swapped` components bring all they hold resident when they run and take it away when another one does, `streamed`
    ones have so many blocks streamed (`PartialResidency`), `leaves` come leaf by leaf; all else stays.
    """

    name = "one_at_a_time"
    axis = "placement"

    # All components: settings are put on one after another, this one once, with the first of them.
    everything: tuple[str, ...] = ()
    swapped: tuple[str, ...] = ()
    streamed: tuple[tuple[str, int], ...] = ()
    leaves: tuple[str, ...] = ()
    # Part of its text, so that a simulation of another version of this file is not taken from the cache.
    code: str = field(default_factory=_code)

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Through the same hooks of accelerate and diffusers that the tools use."""
        from accelerate.hooks import add_hook_to_module

        for name, count in self.streamed:
            PartialResidency(streamed=count).apply(pipe, [name], device)
        for name in self.leaves:
            of_a_vae = hasattr(pipe.components[name], "decode")  # streams do nothing there
            GroupOffload(type="leaf", stream=not of_a_vae).apply(pipe, [name], device)
        streamed = dict(self.streamed)
        held: dict[str, list[torch.Tensor]] = {}
        for name in self.everything:
            module = pipe.components[name]
            if name in self.swapped:
                own = [*module.parameters(), *module.buffers()]
                held[name] = [tensor for tensor in own if name not in streamed or tensor.device.type != "cpu"]
            elif name not in streamed and name not in self.leaves:
                module.to(device)
        for tensors in held.values():
            _move(tensors, "cpu")
        for name in self.everything:
            add_hook_to_module(pipe.components[name], _swap_hook(name, held, device))


def _swap_hook(name: str, held: Mapping[str, Sequence[torch.Tensor]], device: str) -> Any:
    """A hook that makes room for a component and brings it."""
    import torch
    from accelerate.hooks import ModelHook

    class Hook(ModelHook):  # type: ignore[misc]
        execution_device = torch.device(device)

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            for other, tensors in held.items():
                if other != name:
                    _move(tensors, "cpu")
            torch.cuda.empty_cache()
            _move(held.get(name, ()), device)
            return args, kwargs

    return Hook()


def _move(tensors: Sequence[torch.Tensor], device: str) -> None:
    for tensor in tensors:
        tensor.data = tensor.data.to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a rule places: to be priced, and to be put on a pipeline."""

    priced: Mapping[str, Any]
    runs_as: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a rule may look at; `footprint` stands for the free memory that a tool reads while a call runs."""

    spec: PipelineSpec
    budget: Budget
    accelerator: Accelerator
    footprint: Footprint

    @property
    def vram(self) -> int:
        return self.budget.vram_bytes or 0

    def streamed(self, limits: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
        """For each component the number of streamed blocks that keeps it within so many bytes, where it can be."""
        found = []
        for name, limit in limits.items():
            component = self.spec.component(name)
            pinned = (setting for setting in PartialResidency.variants(component) if not setting.disk)
            settings = [setting for setting in pinned if self._within(setting, component, limit)]
            found += [(name, settings[-1].streamed)] if settings else []
        return tuple(found)

    def _within(self, setting: PartialResidency, component: Component, limit: int) -> bool:
        able = setting.refusal(component, self.spec, self.accelerator) is None
        return able and setting.hold(component, self.spec).running_bytes <= limit

    def everywhere(self, setting: Placement) -> Choice | None:
        """One setting for the whole pipeline; None where a component cannot take it."""
        if any(setting.refusal(component, self.spec, self.accelerator) for component in self.spec.components):
            return None
        placed = {component.name: setting for component in self.spec.components}
        return Choice(priced=placed, runs_as=placed)

    def run_as(self, setting: OneAtATime) -> Mapping[str, Any]:
        names = tuple(component.name for component in self.spec.components)
        return {names[0]: replace(setting, everything=names)}


Rule = Callable[[Asked], Choice | None]


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
        cut = {name: holds[name].running_bytes for name, limit in limits.items() if limit}
        streamed = asked.streamed(cut)
        leaves = tuple(name for name in cut if name not in dict(streamed))
        swapped = tuple(name for name in limits if name not in leaves)
        return Choice(
            priced={name: Held(held=hold) for name, hold in holds.items()},
            runs_as=asked.run_as(OneAtATime(swapped=swapped, streamed=streamed, leaves=leaves)),
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
    rate = 1 / (pinned_share + (1 - pinned_share) / _PAGEABLE_RATE)
    if not limit:
        # not `pageable`: mmgp only drops a component that leaves, and nothing is copied back
        return Hold(running_bytes=size, lingers=True, pinned_bytes=pinned, host_bytes=size - pinned, rate=rate)
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
        runs_as=asked.run_as(OneAtATime(swapped=tuple(c.name for c in components if c.name in swapped))),
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
    denoisers = [component for component in spec.components if component.role in ("denoiser", "control")]
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
    names = tuple(component.name for component in asked.spec.components)
    return Choice(
        priced=dict.fromkeys(names, _mm_leaf(asked)),
        runs_as=asked.run_as(OneAtATime(leaves=names)),
    )


def _mm_pinned(asked: Asked) -> Choice:
    """The first blocks of the denoiser stay, the rest of it is streamed by leaves, as is everything else."""
    components = asked.spec.components
    holds = {c.name: _mm_pin(asked, c) for c in components if c.role in ("denoiser", "control")}
    streamed = asked.streamed({name: hold.running_bytes for name, hold in holds.items() if hold.moved_in_bytes})
    leaves = tuple(c.name for c in components if c.name not in holds)
    swapped = tuple(name for name, hold in holds.items() if hold.lingers)
    return Choice(
        priced={**dict.fromkeys(leaves, _mm_leaf(asked)), **{name: Held(held=hold) for name, hold in holds.items()}},
        runs_as=asked.run_as(OneAtATime(swapped=swapped, streamed=streamed, leaves=leaves)),
    )


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
}
