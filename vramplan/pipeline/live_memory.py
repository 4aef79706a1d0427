"""Measure the memory that a live pipeline already takes, and refuse one that is already offloaded."""

from __future__ import annotations

from collections.abc import Sequence

from vramplan.errors import VramplanError
from vramplan.pipeline.types import Component, PipelineSpec


def refuse_hooked(spec: PipelineSpec) -> None:
    """Raise VramplanError if the pipeline already has offloading hooks: hooks on hooks go wrong silently."""
    for component in spec.components:
        offloads = [hook for hook in component.hooks if hook != "layerwise_casting"]
        if offloads:
            raise VramplanError(
                f"{component.name} already has {offloads[0].replace('_', ' ')}, set outside vramplan: load the "
                "pipeline again, or remove it first (pipe.remove_all_hooks() for model and sequential offload); if it "
                "is shared with another pipeline, undo the plan there (vramplan.applied_to(other).undo())"
            )


def held_bytes(spec: PipelineSpec) -> dict[str, int]:
    """The VRAM and RAM that a live pipeline's weights take now, in bytes, as keyword arguments of `make_budget`: they
    are still to be placed, so that they do not count as used."""
    return {
        "held_vram_bytes": _held(spec.components, on_host=False),
        "held_ram_bytes": _held(spec.components, on_host=True),
    }


def _held(components: Sequence[Component], *, on_host: bool) -> int:
    return sum(
        component.weight_bytes
        for component in components
        if component.device not in (None, "meta") and (component.device == "cpu") == on_host
    )
