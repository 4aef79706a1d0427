"""What a rule of another tool is asked, and what it answers: the terms of `regret_peers.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from vramplan.hardware.rates import Rates
from vramplan.hardware.types import Accelerator, Budget
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.planner.clock import DEFAULT_RATES
from vramplan.planner.footprint import Footprint
from vramplan.strategies import Placement
from vramplan.strategies.base import Hold, Quality
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.resident import Resident
from vramplan.strategies.weight_streaming import LEAST_STREAMED, WeightStreaming, streaming_sizes
from vramplan.streaming.division import worth_streaming
from vramplan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A placement known by its hold alone: it can be priced, not applied."""

    name: ClassVar[str] = "peer"
    direct: ClassVar[bool] = False
    freed: ClassVar[bool] = False
    quality: ClassVar[Quality] = "lossless"

    held: Hold

    def hold(self, component: Component, spec: PipelineSpec) -> Hold:
        return self.held


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a rule places: to be priced, and the nearest settings that there are, to be run on a simulated device.

    On the device, weight streaming that keeps nothing is what these tools do: a component is there, with two blocks of
    it in turn for those that are streamed, until another one runs.
    """

    priced: Mapping[str, Held | Placement]
    runs_as: Mapping[str, Placement]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a rule may look at; `footprint` stands for the free memory that a tool reads while a call runs."""

    spec: PipelineSpec
    work: Workload
    budget: Budget
    accelerator: Accelerator
    footprint: Footprint

    @property
    def vram(self) -> int:
        return self.budget.vram_bytes or 0

    @property
    def rates(self) -> Rates:
        return self.accelerator.rates or DEFAULT_RATES

    @property
    def denoisers(self) -> list[Component]:
        return [component for component in self.spec.components if component.role in ("denoiser", "control")]

    def within(self, component: Component, limit: int, *, stays: bool = False) -> Placement:
        """The component with as few streamed blocks as keep it within so many bytes, in leaves where none do.

        If it `stays`, its other blocks are on the device throughout.
        """
        most = len(worth_streaming(streaming_sizes(component)))
        for count in (0, *range(LEAST_STREAMED, most + 1)):
            keep = len(streaming_sizes(component)) - count if stays else 0
            setting = WeightStreaming(streamed=count, keep=keep)
            if setting.hold(component, self.spec).running_bytes <= limit:
                return setting
        return self.leaves(component)

    def leaves(self, component: Component, *, low_cpu_mem_usage: bool = False) -> Placement:
        """Group offload of leaves, with a stream where it works: not for a VAE."""
        stream = component.role != "vae"
        setting = GroupOffload(type="leaf", stream=stream, low_cpu_mem_usage=low_cpu_mem_usage and stream)
        return setting if setting.refusal(component, self.spec, self.accelerator) is None else Resident()

    def everywhere(self, setting: Placement) -> Choice | None:
        """One setting for the whole pipeline; None where a component cannot take it."""
        if any(setting.refusal(component, self.spec, self.accelerator) for component in self.spec.components):
            return None
        placed = {component.name: setting for component in self.spec.components}
        return Choice(priced=placed, runs_as=placed)


Rule = Callable[[Asked], Choice | None]
# Copies from pageable memory, of the rate from page-locked memory.
PAGEABLE_RATE = 0.5


def mixed_rate(locked_share: float) -> float:
    """The rate of copies of which only a share is from page-locked memory."""
    return 1 / (locked_share + (1 - locked_share) / PAGEABLE_RATE)
