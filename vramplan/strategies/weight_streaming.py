"""Weight streaming: weights are a cache on the device, filled ahead of need; dropping one copies nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from vramplan.hardware.types import Accelerator
from vramplan.pipeline.component import STREAMED
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.strategies.base import Axis, Hold, Quality, offload_refusal
from vramplan.streaming.division import (
    CHUNK_BYTES,
    STAGE_BYTES,
    STAGES,
    Division,
    divide,
    totals,
    worth_streaming,
)

# Fewer streamed blocks save nothing: two are on the device at once.
LEAST_STREAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightStreaming:
    """`streamed` of the component's blocks are on the device only while they run, the first `keep` others always, all
    other weights while the component's phase of the call lasts.

    Large blocks count by their pieces (`Geometry.units`). A VAE, which runs by its methods, comes and goes as a whole.
    `locked` blocks have their copy in host memory page-locked, those first that are copied most often, and with them
    the weights outside of blocks; all others are copied from where they were loaded to, the model's own files say.
    """

    name: ClassVar[str] = "weight_streaming"
    axis: ClassVar[Axis] = "placement"
    stock: ClassVar[bool] = False
    quality: ClassVar[Quality] = "lossless"
    whole_pipeline: ClassVar[bool] = False
    freed: ClassVar[bool] = False
    direct: ClassVar[bool] = False
    leaves: ClassVar[tuple[str, ...]] = (STREAMED, "_apply")

    streamed: int = 0
    keep: int = 0
    locked: int = 0

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """Nothing: the planner solves for the numbers of all components at once (`planner.streaming`)."""
        return ()

    def complete(self, component: Component) -> Self:
        """Return the setting unchanged."""
        return self

    def unpinned(self) -> Self:
        """Return the setting unchanged: what cannot be page-locked is left as it is, with a note."""
        return self

    def refusal(self, component: Component, spec: PipelineSpec, accelerator: Accelerator | None) -> str | None:
        """Refuse components that cannot be moved or are compiled as a whole, and numbers of blocks out of range."""
        if accelerator is None:
            return "weight streaming needs an accelerator, and none was found"
        impossible = component.streaming_refusal or offload_refusal(component, spec, accelerator)
        return _number_refusal(self, component) or impossible

    def hold(self, component: Component, spec: PipelineSpec) -> Hold:
        """Kept blocks always; while the component runs all but the streamed ones, and two slots for those."""
        sizes = streaming_sizes(component)
        total = totals(sizes, self.streamed)
        moved, kept = total.streamed[-1], total.others[self.keep]
        cached = total.others[-1] - kept
        rest = component.weight_bytes - moved - total.others[-1]
        idle, cached = (kept + rest, cached) if self.keep else (kept, cached + rest)
        running = component.weight_bytes - moved + total.slots
        locked_moved, locked_cached = total.locked(self.locked, self.keep)
        locked_cached += rest if self.locked and not self.keep else 0
        pinned, loose = locked_moved + locked_cached, moved + cached - locked_moved - locked_cached
        mapped = component.device is None and not component.converted_at_load and not component.cast_from_bytes
        return Hold(
            running_bytes=running,
            idle_bytes=idle,
            loop_bytes=running,
            host_bytes=0 if mapped else loose,
            pinned_bytes=pinned,
            shared_pinned_bytes=STAGES * STAGE_BYTES if loose else 0,
            host_transient_bytes=0 if mapped else min(pinned, CHUNK_BYTES),
            moved_in_bytes=locked_moved,
            gathered_bytes=moved - locked_moved,
            entry_bytes=locked_cached,
            entry_gathered_bytes=cached - locked_cached,
            from_file=mapped,
            overlapped=True,
            flat=True,
            blocks=(self.keep, len(sizes) - self.streamed, len(sizes)),
        )

    def division(self, component: Component) -> Division:
        """The blocks by where they are."""
        return divide(streaming_sizes(component), streamed=self.streamed, keep=self.keep)

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Attach each component to the pipeline's cache on the device."""
        from vramplan.streaming.attach import stream_weights

        stream_weights(pipe, device, **dict.fromkeys(names, self._options))

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Detach the components. Kept weights stay on the device, all others are in host memory."""
        from vramplan.streaming.attach import detach

        for name in names:
            detach(pipe.components[name])

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """An import and one call."""
        options = ", ".join(f"{key}={value}" for key, value in self._options.items())
        components = ", ".join(f"{name}=dict({options})" for name in names)
        return [
            "from vramplan import stream_weights",
            f'stream_weights(pipe, "{device}", {components})',
        ]

    @property
    def _options(self) -> dict[str, int]:
        given = {"streamed": self.streamed, "keep": self.keep, "locked": self.locked}
        return {key: value for key, value in given.items() if value}


def streaming_sizes(component: Component) -> tuple[int, ...]:
    """The bytes of the blocks that streaming can divide a component into; empty for a VAE."""
    return () if component.role == "vae" else component.geometry.units


def _number_refusal(setting: WeightStreaming, component: Component) -> str | None:
    sizes = streaming_sizes(component)
    most = len(worth_streaming(sizes))
    if setting.streamed < 0 or setting.keep < 0 or setting.locked < 0:
        return f"{setting.name}: numbers of blocks are not negative"
    if setting.streamed and not LEAST_STREAMED <= setting.streamed <= most:
        able = f"can stream {LEAST_STREAMED} to {most} of its blocks" if most >= LEAST_STREAMED else "cannot be cut"
        return f"streamed={setting.streamed}: {component.class_name} {able}"
    if setting.keep > len(sizes) - setting.streamed:
        return f"keep={setting.keep}: {component.class_name} has {len(sizes) - setting.streamed} other blocks to keep"
    return None
