"""VRAM that a plan leaves idle, whether more blocks could stay in it, and the memory that it page-locks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from regret_candidates import Candidate, Subject

from vramplan.pipeline.types import Component
from vramplan.strategies.resident import Resident
from vramplan.strategies.weight_streaming import WeightStreaming, streaming_sizes
from vramplan.units import GIB


def idle(subject: Subject, vram_gib: float, chosen: Candidate) -> dict[str, Any]:
    """VRAM left idle while denoising, the smallest block that is streamed, if any is, and the share of the call's time
    that room for everything would save: more than any use of what is idle could.

    A block that stays for the whole call needs room in every phase: `tightest_gib` is what the fullest one leaves,
    `keepable_gib` the least that could stay in addition.
    """
    denoising = next(phase.reserved_bytes for phase in chosen.demand.phases if phase.name == "denoise")
    tightest = max(chosen.demand.phases, key=lambda phase: phase.reserved_bytes)
    blocks = {name: smallest_streamed(subject.spec.component(name), each) for name, each in streams(chosen)}
    keepable = [smallest_keepable(subject.spec.component(name), each) for name, each in streams(chosen)]
    seconds = subject.price(dict.fromkeys(chosen.placement, Resident()), chosen.decode).seconds_per_call
    return {
        "idle_gib": rounded(vram_gib - denoising / GIB),
        "blocks_gib": {name: rounded(size / GIB) for name, size in blocks.items() if size},
        "in_loop": any(blocks.get(use.component) for use in subject.spec.uses if use.in_loop),
        "idle_worth": rounded(1 - seconds / chosen.demand.seconds_per_call),
        "tightest_phase": tightest.name,
        "tightest_gib": rounded(vram_gib - tightest.reserved_bytes / GIB),
        "keepable_gib": rounded(min(keepable) / GIB) if keepable else None,
    }


def streams(candidate: Candidate) -> Iterator[tuple[str, WeightStreaming]]:
    """The components under weight streaming."""
    placed = candidate.placement.items()
    yield from ((name, setting) for name, setting in placed if isinstance(setting, WeightStreaming))


def smallest_streamed(component: Component, setting: WeightStreaming) -> int:
    sizes = streaming_sizes(component)
    return min((sizes[place] for place in setting.division(component).streamed), default=0)


def smallest_keepable(component: Component, setting: WeightStreaming) -> int:
    """The least of its weights that could stay in addition: the smallest block that does not stay, with the weights
    outside of blocks where these do not; all of a component without blocks."""
    sizes, division = streaming_sizes(component), setting.division(component)
    rest = 0 if setting.keep else component.weight_bytes - sum(sizes)
    return rest + min((sizes[place] for place in division.by_need), default=0)


def locked(subject: Subject, chosen: Candidate) -> dict[str, Any]:
    """Page-locked bytes under weight streaming, those of weights that are copied from them, and of all that are
    copied."""
    holds = [each.hold(subject.spec.component(name), subject.spec) for name, each in streams(chosen)]
    used = sum(hold.moved_in_bytes + hold.entry_bytes for hold in holds)
    through = sum(hold.gathered_bytes + hold.entry_gathered_bytes for hold in holds)
    shared = max((hold.shared_pinned_bytes for hold in holds), default=0)
    return {
        "locked_gib": rounded((sum(hold.pinned_bytes for hold in holds) + shared) / GIB),
        "locked_used_gib": rounded(used / GIB),
        "copied_gib": rounded((used + through) / GIB),
    }


def rounded(value: float) -> float:
    return float(f"{value:.4g}")
