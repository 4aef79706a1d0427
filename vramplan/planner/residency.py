"""Replay a call: which components are on the device together, and which weights move when.

Model offload does not hold one component at a time. Its chain sends back only the immediate predecessor, and only when
the successor runs (accelerate 1.15, `CpuOffload.pre_forward`): a VAE that encoded a picture stays with the denoiser, a
text encoder whose successor is skipped stays to the end. Components that are freed once the prompt is encoded are never
on the device with others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vramplan.pipeline.types import PipelineSpec, Use
from vramplan.strategies.base import Hold


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedUse:
    """One use of the replayed call: the weights on the device during it, and the weights it moved, in bytes.

    `on_device` names the components with weights there, `blocks` counts the blocks that stay and all of those that are
    streamed. In-loop uses come twice; `repeat` is 1 in the second round,
    which stands for every later step.
    """

    use: Use
    weights_bytes: int
    on_device: tuple[str, ...]
    blocks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    loaded_bytes: int = 0
    sent_back_bytes: int = 0
    repeat: int = 0


def replay(spec: PipelineSpec, holds: Mapping[str, Hold], *, skip_optional: bool = False) -> list[ReplayedUse]:
    """Return the uses of one call under these holds, in order."""
    sequence = spec.sequence or ()
    predecessor = dict(zip(sequence[1:], sequence[:-1], strict=True))
    looping = {use.component for use in spec.uses if use.in_loop}
    beside = {
        loop: {name: hold.bytes_beside(in_loop=loop and name in looping) for name, hold in holds.items()}
        for loop in (True, False)
    }
    there = {
        (freed, loop): sum(beside[loop][name] for name in holds if holds[name].freed == freed)
        for freed in (True, False)
        for loop in (True, False)
    }
    present: dict[str, int] = {}
    replayed_uses = []
    for use, repeat in schedule(spec.uses, skip_optional=skip_optional):
        hold = holds[use.component]
        loaded = sent_back = 0
        if hold.lingers:
            sent_back = present.pop(predecessor.get(use.component, ""), 0)
            loaded = 0 if use.component in present else hold.running_bytes
            present[use.component] = hold.running_bytes
        weights = there[hold.freed, use.in_loop] + sum(present.values())
        if not hold.lingers:
            weights += hold.running_bytes - beside[use.in_loop][use.component]
        replayed_uses.append(
            ReplayedUse(
                use=use,
                weights_bytes=weights,
                on_device=_on_device(holds, beside[use.in_loop], present, use),
                blocks={
                    name: (
                        hold.blocks[1 if name == use.component or (use.in_loop and name in looping) else 0],
                        hold.blocks[2],
                    )
                    for name, hold in holds.items()
                    if hold.blocks is not None and hold.blocks[2]
                },
                loaded_bytes=loaded,
                sent_back_bytes=sent_back,
                repeat=repeat,
            )
        )
    return replayed_uses


def schedule(uses: Sequence[Use], *, skip_optional: bool) -> Iterable[tuple[Use, int]]:
    """Yield the uses of one call in order with the round of the loop (0 or 1): in-loop uses come twice."""
    kept = [use for use in uses if not (skip_optional and use.optional)]
    loop = [use for use in kept if use.in_loop]
    first = kept.index(loop[0]) if loop else len(kept)
    yield from ((use, 0) for use in kept[:first])
    yield from ((use, repeat) for repeat in (0, 1) for use in loop)
    yield from ((use, 0) for use in kept[first:] if not use.in_loop)


def _on_device(
    holds: Mapping[str, Hold], beside: Mapping[str, int], present: Mapping[str, int], use: Use
) -> tuple[str, ...]:
    stage = holds[use.component].freed
    return tuple(
        name
        for name, hold in holds.items()
        if name == use.component or name in present or (beside[name] and hold.freed == stage)
    )
