"""Derive the order in which a pipeline's components run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vramplan.pipeline.classes import ClassFacts
from vramplan.pipeline.types import Component, PhaseName, Use

# Components that never run: AnimateDiff copies its motion adapter into the UNet.
_NEVER_RUN = frozenset({"motion_adapter"})


def uses_of(components: Sequence[Component], facts: ClassFacts) -> tuple[Use, ...]:
    """The uses of one call, in order: encoders, the VAE if it encodes a picture, the denoising loop, the decode.

    Text encoders run twice, for the prompt and the negative prompt: with several of them, the last one is still on
    the device when the second round begins (StableDiffusion3Pipeline, model offload).
    """
    order = {name: index for index, name in enumerate(facts.sequence or ())}
    ordered = sorted(components, key=lambda component: order.get(component.name, len(order)))
    ordered = [component for component in ordered if component.name not in _NEVER_RUN]
    loop = [c for c in ordered if c.role == "control"] + [c for c in ordered if c.role == "denoiser"]
    before, after = _split_at_loop(ordered, loop, order)
    vaes = [component for component in ordered if component.role == "vae"]
    return (
        *_uses("encode", [c for c in before if c.role == "text_encoder"] * 2, facts),
        *_uses("encode", [c for c in before if c.role != "text_encoder"], facts),
        *(_uses("encode", vaes, facts) if facts.conditions else ()),
        *(Use(phase="denoise", component=c.name, in_loop=True) for c in loop),
        *_uses("decode", [c for c in vaes if c not in after] + after, facts),
    )


def _split_at_loop(
    ordered: Sequence[Component], loop: Sequence[Component], order: dict[str, int]
) -> tuple[list[Component], list[Component]]:
    """The components before and after the loop; a checker or vocoder outside of the sequence comes after."""
    last = max((order.get(component.name, -1) for component in loop), default=-1)
    rest = [component for component in ordered if component not in loop]
    before = [c for c in rest if c.role in ("text_encoder", "image_encoder")]
    before += [c for c in rest if c.role == "other" and order.get(c.name, last + 1) < last]
    return before, [component for component in rest if component not in before]


def _uses(phase: PhaseName, components: Iterable[Component], facts: ClassFacts) -> tuple[Use, ...]:
    return tuple(
        Use(
            phase=phase,
            component=component.name,
            optional=component.role == "image_encoder" or component.name in facts.optional_uses,
        )
        for component in components
    )
