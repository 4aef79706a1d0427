"""The card that both conformance benchmarks simulate on, and the forms of weight streaming that they try."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramplan.hardware.types import Accelerator

if TYPE_CHECKING:
    from vramplan.pipeline.types import Component


def accelerator() -> Accelerator:
    """A card of 1 TiB, so that no test pipeline is too large for it."""
    return Accelerator(kind="cuda", index=0, name="simulated", total_bytes=1 << 40, free_bytes=1 << 40)


def all_streamed(component: Component) -> str:
    """Every block that can be is streamed from where it was loaded to; nothing is kept."""
    return f"weight_streaming:streamed={_streamable(component)}"


def half_streamed(component: Component) -> str:
    """Half of the blocks are streamed, half of the others kept, half of those that move page-locked."""
    from vramplan.strategies.weight_streaming import LEAST_STREAMED, streaming_sizes

    streamed = min(max(_streamable(component) // 2, LEAST_STREAMED), _streamable(component))
    others = len(streaming_sizes(component)) - streamed
    keep = others // 2
    return f"weight_streaming:streamed={streamed},keep={keep},locked={(streamed + others - keep + 1) // 2}"


def _streamable(component: Component) -> int:
    """The number of blocks that can be streamed; 0 if those are too few."""
    from vramplan.strategies.weight_streaming import LEAST_STREAMED, streaming_sizes
    from vramplan.streaming.division import worth_streaming

    found = len(worth_streaming(streaming_sizes(component)))
    return found if found >= LEAST_STREAMED else 0
