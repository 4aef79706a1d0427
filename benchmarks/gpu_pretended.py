"""The CPU in place of a card, and tiny pipelines in place of large ones, for `gpu_accuracy.py --pretend`.

Nothing that is measured so means anything. It shows that every line runs, before a card is at hand.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vramplan.pipeline.describe import describe
from vramplan.pipeline.types import Component
from vramplan.simulator.parts import Parts, parts_from_live
from vramplan.strategies.base import Placement
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.sequential_cpu_offload import SequentialCpuOffload
from vramplan.strategies.weight_streaming import WeightStreaming, streaming_sizes
from vramplan.streaming.division import worth_streaming
from vramplan.units import GIB
from vramplan.workload import Workload, make_workload

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

KINDS = {
    "stable-diffusion-1.5": "sd15-small",
    "stable-diffusion-xl": "sdxl-small",
    "flux.1-dev": "flux-small",
    "cogvideox-2b": "cogvideox-small",
    "cogvideox-5b": "cogvideox-small",
}
LARGEST = {"height": 64, "width": 64, "num_frames": 9, "num_images_per_prompt": 2}
ANSWERS: Mapping[str, Any] = {
    "synchronize": None,
    "empty_cache": None,
    "reset_peak_memory_stats": None,
    "memory_allocated": 1 << 20,
    "memory_reserved": 2 << 20,
    "max_memory_allocated": 3 << 20,
    "max_memory_reserved": 4 << 20,
    "memory_stats": {"allocated_bytes.all.peak": 3 << 20, "num_alloc_retries": 0},
    "mem_get_info": (7 * GIB, 8 * GIB),
    "get_device_capability": (8, 9),
    "get_device_properties": SimpleNamespace(name="no card", major=8, minor=9, total_memory=8 * GIB),
}


class PretendedCuda:
    """What of `torch.cuda` is asked for, by its own names and with its own arguments."""

    def __getattr__(self, name: str) -> Any:
        signature = inspect.signature(getattr(torch.cuda, name))

        def answer(*args: Any, **kwargs: Any) -> Any:
            signature.bind(*args, **kwargs)
            return ANSWERS[name]

        return answer


@cache
def small_pipeline(name: str) -> Any:
    """The small pipeline of the same class as the profile's. Made once: its modules are copied."""
    from make_pipeline import build

    return build(KINDS[name])


def small_parts(name: str) -> Parts:
    """In place of the profile's parts."""
    return parts_from_live(small_pipeline(name))


def small_description(name: str) -> Any:
    """In place of the profile's description."""
    return describe(small_pipeline(name))


def small_workload(defaults: Mapping[str, Any], given: Mapping[str, int]) -> Workload:
    """In place of a large one: what was given is given, if less of it."""
    sizes = {name: min(value, LARGEST[name]) for name, value in given.items()}
    return make_workload(defaults, {"height": 64, "width": 64} | sizes)


def few(shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """The first two, of at most eight in every dimension."""
    return tuple(tuple(min(length, 8) for length in shape) for shape in shapes[:2])


def without_streams(setting: Placement, component: Component) -> Placement:
    """The setting as the CPU and a small component can have it: without streams or hooks for another device, with few
    blocks."""
    if isinstance(setting, SequentialCpuOffload):
        return GroupOffload(type="leaf")
    if isinstance(setting, GroupOffload):
        return replace(setting, stream=False, record_stream=False, low_cpu_mem_usage=False)
    if isinstance(setting, WeightStreaming):
        most = len(worth_streaming(streaming_sizes(component)))
        return replace(setting, streamed=min(setting.streamed, most), locked=min(setting.locked, most))
    return setting
