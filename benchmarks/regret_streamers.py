"""The rules of two tools that stream a denoiser from memory or files of their own, read in their wheels.

* AirCanvas 0.1.0, uncompressed (`residency.solve`): what activations (four values a token and channel), weights outside
  of blocks and a headroom leave of VRAM takes two slots and as many of the first blocks as fit. What is left of RAM
  caches the rest; all else of it is read from its own files in each step, copied through a page-locked ring of three
  blocks. Encoders run together on the device if they take 80 % of it at most, else on the CPU. The VAE decodes in
  tiles, beside what the denoiser keeps, for which it leaves little: its user is taken to lower `vram_budget` until it
  fits. It needs a pipeline with a `transformer`.
* diffusers-dynamic-offloader 0.1.0rc2 (preset auto): each linear is copied when it runs, without a stream, and some of
  the blocks of the longest list stay: a quarter of them, or what a headroom leaves of VRAM, or, once a first run was
  measured (a profile), what its peak and 1 GiB left. 75 to 100 % of it is page-locked if RAM holds all weights and 8
  GiB more, else nothing. Encoders go leaf by leaf with a stream, the VAE without. A UNet, for which there is another
  route with convolutions, is page-locked as a whole, with nothing that stays.
"""

from __future__ import annotations

from regret_asked import Asked, Choice, Held, Rule, mixed_rate

from vramplan.pipeline.latents import denoiser_shape
from vramplan.pipeline.types import Component
from vramplan.planner import times
from vramplan.planner.clock import CPU_RATES
from vramplan.strategies import Placement
from vramplan.strategies.base import Hold
from vramplan.units import GIB, MIB

# ---- AirCanvas

_ACTIVATION_VALUES, _LEAST_ACTIVATIONS = 4, 256 * MIB
_VRAM_HEADROOM, _RAM_HEADROOM = 384 * MIB, 1 * GIB
_ENCODERS_SHARE, _RING, _SLOTS = 0.8, 3, 2


def aircanvas(asked: Asked) -> Choice | None:
    """The waterfall; None for a pipeline without a transformer, or where not even the slots fit."""
    spec = asked.spec
    if all(component.name != "transformer" for component in spec.components):
        return None
    encoders = [c for c in spec.components if c.role not in ("denoiser", "control", "vae")]
    on_device = sum(c.weight_bytes for c in encoders) <= _ENCODERS_SHARE * asked.vram
    in_ram = sum(c.weight_bytes for c in spec.components if c not in asked.denoisers)
    ram = asked.budget.ram_bytes - _RAM_HEADROOM - in_ram
    priced: dict[str, Held | Placement] = {}
    runs_as: dict[str, Placement] = {}
    kept = 0
    for component in asked.denoisers:
        hold = _waterfall(asked, component, ram // len(asked.denoisers))
        if hold is None:
            return None
        kept = max(kept, hold.running_bytes)
        priced[component.name] = Held(held=hold)
        runs_as[component.name] = asked.within(component, hold.running_bytes)
    for component in spec.components:
        size = component.weight_bytes
        if component in encoders:
            priced[component.name] = Held(held=_swapped(size) if on_device else _on_cpu(asked, component))
            runs_as[component.name] = asked.within(component, size) if on_device else asked.leaves(component)
        elif component.role == "vae":
            # beside the denoiser; its way back to the CPU is left out
            hold = Hold(running_bytes=size + kept, host_bytes=size, entry_bytes=size, pageable=True)
            priced[component.name] = Held(held=hold)
            runs_as[component.name] = asked.within(component, size)
    return Choice(priced=priced, runs_as=runs_as)


def _waterfall(asked: Asked, component: Component, ram: int) -> Hold | None:
    shape = denoiser_shape(component, asked.spec, asked.work)
    values = _ACTIVATION_VALUES * shape.tokens * shape.width * component.element_bytes
    geometry, sizes = component.geometry, component.geometry.blocks
    fixed = max(_LEAST_ACTIVATIONS, values) + geometry.rest_bytes + _VRAM_HEADROOM
    taken = [sum(sizes[:kept]) + _SLOTS * max(sizes[kept:], default=0) for kept in range(len(sizes) + 1)]
    able = [kept for kept, size in enumerate(taken) if fixed + size <= asked.vram]
    if not sizes or not able:
        return None
    streamed = sizes[able[-1] :]
    ring = max(1, min(_RING, ram // max(streamed, default=1))) * max(streamed, default=0)
    cached = min(sum(streamed), max(0, ram - ring))
    return Hold(
        running_bytes=geometry.rest_bytes + taken[able[-1]],
        host_bytes=cached,
        pinned_bytes=ring,
        gathered_bytes=cached,
        disk_bytes=sum(streamed) - cached,
        overlapped=True,
        flat=True,
    )


def _swapped(size: int) -> Hold:
    """Whole to the device and back, by `.to()`."""
    return Hold(running_bytes=size, lingers=True, host_bytes=size, pageable=True)


def _on_cpu(asked: Asked, component: Component) -> Hold:
    """Nothing on the device; what a CPU takes longer is told as waiting."""
    works = [asked.footprint.work(use, ()) for use in asked.spec.uses if use.component == component.name]
    seconds = sum(times.products(work, CPU_RATES) + times.traffic(work, CPU_RATES) for work in works)
    forwards = max(1.0, sum(work.forwards for work in works))
    pauses = int(seconds / forwards / asked.rates.pause_seconds)
    return Hold(running_bytes=0, host_bytes=component.weight_bytes, pauses=pauses)


# ---- diffusers-dynamic-offloader

_SYSTEM_HEADROOM, _PROFILE_HEADROOM, _FULL_PIN_RATIO, _RESIDENT_SHARE = 8 * GIB, 1 * GIB, 4.0, 0.25


def dynamic_offloader(*, profiled: bool) -> Rule:
    """The rule of its preset, with a recorded profile or without."""

    def rule(asked: Asked) -> Choice:
        others = [c for c in asked.spec.components if c not in asked.denoisers]
        placed = {c.name: asked.leaves(c, low_cpu_mem_usage=c.role != "vae") for c in others}
        holds = {c.name: _linears(asked, c, profiled=profiled) for c in asked.denoisers}
        within = {c.name: asked.within(c, holds[c.name].running_bytes, stays=True) for c in asked.denoisers}
        return Choice(
            priced={**placed, **{name: Held(held=hold) for name, hold in holds.items()}}, runs_as={**placed, **within}
        )

    return rule


def _linears(asked: Asked, component: Component, *, profiled: bool) -> Hold:
    size, leaf = component.weight_bytes, component.geometry.largest_leaf_bytes
    blocks = max(component.geometry.block_lists, key=sum, default=())
    usable = max(0, asked.budget.ram_bytes - _SYSTEM_HEADROOM)
    budget, everything = _resident_budget(asked, sum(blocks), size, usable, profiled=profiled)
    if denoiser_shape(component, asked.spec, asked.work).convolutional:
        budget, everything = 0, True
    kept = 0
    for block in blocks:
        kept += block if kept + block <= budget else 0
    moved, share = size - kept, _locked_share(size, everything)
    if not everything and usable < size + budget:
        share = 0.0
    locked = int(moved * share) if share < 0.95 else moved
    return Hold(
        running_bytes=kept + min(moved, leaf),
        idle_bytes=kept,
        host_bytes=moved - locked,
        pinned_bytes=locked,
        moved_in_bytes=moved,
        rate=mixed_rate(locked / max(1, moved)),
        flat=True,
    )


def _resident_budget(asked: Asked, blocks: int, size: int, usable: int, *, profiled: bool) -> tuple[int, bool]:
    """The bytes of blocks that stay, and whether all weights are page-locked."""
    ratio = blocks / asked.vram
    everything = usable >= size and ratio >= _FULL_PIN_RATIO
    if profiled:
        measured = max(0, asked.vram - _measured_peak(asked) - _PROFILE_HEADROOM)
        return (min(measured, blocks) if not everything or usable >= size + measured else 0), everything
    if everything:
        return 0, True
    target = max(1 * GIB, asked.vram - int(_vram_headroom(asked.vram / GIB, ratio) * GIB))
    wanted = int(blocks * _RESIDENT_SHARE)
    return min(max(wanted, target) if blocks > asked.vram else wanted, target, blocks), False


def _vram_headroom(vram_gib: float, ratio: float) -> float:
    if vram_gib <= 8.5:
        return 3.0 if ratio <= 2.5 else 2.0
    return 2.5 if vram_gib <= 12.5 else max(3.0, 0.15 * vram_gib)


def _measured_peak(asked: Asked) -> int:
    """The peak of a call in which nothing stays."""
    spec = asked.spec
    needs = (
        asked.footprint.activation(use, ()).reserved_bytes + spec.component(use.component).geometry.largest_leaf_bytes
        for use in spec.uses
    )
    return max(needs, default=0) + asked.footprint.workspace_bytes


def _locked_share(size: int, everything: bool) -> float:
    if everything or size <= 8 * GIB:
        return 1.0
    return 0.85 if size <= 16 * GIB else 0.75
