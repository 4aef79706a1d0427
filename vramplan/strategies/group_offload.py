"""Group offload: groups of blocks, or single leaves, come to the device while they run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

from vramplan.hardware.rates import UNHIDDEN
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.types import Component, Geometry, PipelineSpec
from vramplan.strategies import disk
from vramplan.strategies.base import DIFFUSERS_HOOK, Axis, Hold, Quality, offload_refusal
from vramplan.units import GIB

# Rate of page-locking on the fly: measured at 38.1 s against 9.75 s by block, 13.7 s against 9.48 s by leaf, for five
# forwards of the FLUX.1 transformer (diffusers pull request 11106).
LOW_CPU_MEM_RATE = {"block": 9.75 / 38.1, "leaf": 9.48 / 13.7}
# Smaller components stay in memory: files would save little.
WORTH_A_FILE = 1 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOffload:
    """`diffusers.hooks.apply_group_offloading(component, ...)`.

    `blocks` is the number of blocks in a group (`type=block`). `within` names the submodules that lead to blocks which
    are not direct children, joined by `/`; by default it is filled in. With `disk` the weights are kept in files, in a
    directory that is removed when they are read back or the process ends.
    """

    name: ClassVar[str] = "group_offload"
    axis: ClassVar[Axis] = "placement"
    stock: ClassVar[bool] = True
    quality: ClassVar[Quality] = "lossless"
    whole_pipeline: ClassVar[bool] = False
    freed: ClassVar[bool] = False
    direct: ClassVar[bool] = False
    leaves: ClassVar[tuple[str, ...]] = DIFFUSERS_HOOK

    type: Literal["block", "leaf"] = "block"
    blocks: int = 1
    stream: bool = False
    record_stream: bool = False
    low_cpu_mem_usage: bool = False
    disk: bool = False
    within: str = ""

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """Settings worth trying, with streams except for a VAE: page-locked memory is copied twice as fast."""
        return (setting.complete(component) for setting in cls._variants(component))

    @classmethod
    def _variants(cls, component: Component) -> Iterable[Self]:
        count = len(component.geometry.blocks)
        if component.role in ("denoiser", "control"):
            for kind in ("block", "leaf"):
                yield cls(type=kind, stream=True)
                yield cls(type=kind, stream=True, record_stream=True)
                yield cls(type=kind, stream=True, low_cpu_mem_usage=True)
            yield from (cls(blocks=size) for size in _sizes(count))
        elif count:
            yield cls(blocks=count)
            yield cls(blocks=1)
        if component.role not in ("denoiser", "control", "vae"):
            yield cls(type="leaf", stream=True)
        if count and component.weight_bytes >= WORTH_A_FILE:
            yield cls(disk=True)
        yield cls(type="leaf")

    def complete(self, component: Component) -> Self:
        """Fill in `within`, the submodules that lead to the component's blocks, if it is open."""
        if self.type == "leaf" or self.within:
            return self
        return replace(self, within="/".join(component.geometry.block_modules))

    def unpinned(self) -> Self:
        """Return the setting that page-locks on the fly, if it uses streams."""
        return replace(self, low_cpu_mem_usage=self.stream)

    def refusal(self, component: Component, spec: PipelineSpec, accelerator: Accelerator | None) -> str | None:
        """Refuse combinations that diffusers rejects, and those that are silently wrong."""
        return (
            self._option_refusal()
            or self._stream_refusal(component, accelerator)
            or self._cut_refusal(component)
            or component.group_offload_refusal
            or (component.disk_offload_refusal if self.disk else None)
            or offload_refusal(component, spec, accelerator)
        )

    def _option_refusal(self) -> str | None:
        if self.blocks < 1:
            return f"blocks={self.blocks}: a group holds at least one block"
        if self.type == "leaf" and self.blocks != 1:
            return "blocks is for type=block; leaves are not counted in blocks"
        if not self.stream and (self.record_stream or self.low_cpu_mem_usage):
            return "record_stream and low_cpu_mem_usage only work with stream=true"
        if self.disk and (self.stream or self.type == "leaf"):
            return "disk=true is for type=block without a stream: one file for each group, read straight to the device"
        if self.stream and self.blocks != 1:
            return "with stream=true diffusers always uses one block per group: set blocks=1"
        return None

    def _stream_refusal(self, component: Component, accelerator: Accelerator | None) -> str | None:
        if not self.stream:
            return None
        if component.role == "vae":
            return (
                "streams do nothing for a VAE: decode() never runs the hook that wires the prefetching, "
                "which then leaks on every call"
            )
        if self.type == "block" and component.geometry.block_modules:
            return (
                f"the blocks of {component.class_name} stand inside other modules, where diffusers 0.42 hooks them "
                "twice for prefetching and fails; leave stream out, or use type=leaf"
            )
        if accelerator is None or not accelerator.has_streams:
            return "stream=true needs a device with streams (CUDA, ROCm or XPU)"
        return None

    def _cut_refusal(self, component: Component) -> str | None:
        if self.type == "leaf":
            return component.leaf_offload_refusal
        if not component.geometry.block_lists:
            return f"{component.class_name} has no list of blocks to group; use type=leaf"
        if self.within and self.within != "/".join(component.geometry.block_modules):
            return f"within={self.within}: {component.class_name} has its blocks elsewhere; leave it out"
        return component.block_offload_refusal

    def hold(self, component: Component, spec: PipelineSpec) -> Hold:
        """One group (with streams the next one too) while it runs, nothing while idle.

        Without a stream a group is copied back to newly allocated memory after use; with one it refers to the
        page-locked copy again (diffusers 0.42, `ModuleGroup._offload_to_memory`).
        """
        size, geometry = component.weight_bytes, component.geometry
        pinned = self.stream and not self.low_cpu_mem_usage
        # Weights outside of blocks are always copied in and out without a stream.
        waited = geometry.rest_bytes if self.stream and self.type == "block" else 0
        if self.disk:
            return Hold(
                running_bytes=self._running_bytes(geometry),
                host_transient_bytes=self._running_bytes(geometry),
                disk_bytes=size,
                pauses=self._groups(geometry),
            )
        return Hold(
            running_bytes=self._running_bytes(geometry),
            host_bytes=0 if pinned else size,
            pinned_bytes=geometry.pinned_bytes if pinned else 0,
            host_transient_bytes=size if pinned and self.type == "block" else 0,
            moved_in_bytes=size - waited,
            moved_out_bytes=0 if self.stream else size,
            waited_bytes=2 * waited,
            overlapped=self.stream,
            pauses=0 if self.record_stream else self._groups(geometry),
            rate=LOW_CPU_MEM_RATE[self.type] if self.low_cpu_mem_usage else 1.0,
            pageable=not self.stream,
            unhidden=UNHIDDEN[self.type],
        )

    def _running_bytes(self, geometry: Geometry) -> int:
        """The peak on the device: one group, the next one with a stream, and a third with `record_stream`.

        `record_stream` lets the host run ahead: a group's memory is freed only once the device is done with it.
        """
        live = 1 + self.stream + self.record_stream
        if self.type == "leaf":
            return live * geometry.largest_leaf_bytes
        groups = [sum(chunk) for sizes in geometry.block_lists for chunk in _chunks(sizes, self.blocks)]
        return geometry.rest_bytes + _largest_run(groups, live)

    def _groups(self, geometry: Geometry) -> int:
        if self.type == "leaf":
            return geometry.leaf_count
        return sum(-(-len(sizes) // self.blocks) for sizes in geometry.block_lists)

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Hook each component: the pipeline's own call would hook the VAE too."""
        import torch
        from diffusers.hooks import apply_group_offloading

        for name in names:
            module, options = pipe.components[name], self._options()
            with disk.own_folder(module, name) if self.disk else nullcontext() as folder:
                if folder is not None:
                    options["offload_to_disk_path"] = str(folder)
                apply_group_offloading(module, torch.device(device), **options)

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Remove the hooks, after reading weights in files back to the CPU."""
        if self.disk:
            for name in names:
                disk.bring_back(pipe.components[name])
        _remove_hooks(pipe, names)

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """An import and one call for each component."""
        options = ", ".join(f"{key}={value!r}" for key, value in self._options().items())
        folder = ', offload_to_disk_path="offload/{}"' if self.disk else ""  # must be empty or of this component
        calls = [
            f'apply_group_offloading(pipe.{name}, torch.device("{device}"), {options}{folder.format(name)})'
            for name in names
        ]
        return ["import torch", "from diffusers.hooks import apply_group_offloading", *calls]

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"offload_type": f"{self.type}_level"}
        if self.type == "block":
            options["num_blocks_per_group"] = self.blocks
            options |= {"block_modules": self.within.split("/")} if self.within else {}
        for key in ("stream", "record_stream", "low_cpu_mem_usage"):
            if getattr(self, key):
                options["use_stream" if key == "stream" else key] = True
        return options


def _sizes(count: int) -> Iterable[int]:
    size = 1
    while size < count:
        yield size
        size *= 2


def _chunks(sizes: Sequence[int], length: int) -> Iterable[Sequence[int]]:
    return (sizes[start : start + length] for start in range(0, len(sizes), length))


def _largest_run(groups: Sequence[int], live: int) -> int:
    """Return the largest sum of `live` neighbouring groups, in the order they run."""
    if live == 2 and len(groups) > 1:
        return max(first + second for first, second in pairwise(groups))
    windows = range(max(1, len(groups) - live + 1))
    return max((sum(groups[start : start + live]) for start in windows), default=0)


def _remove_hooks(pipe: Any, names: Sequence[str]) -> None:
    """Remove diffusers' group offloading hooks, for which it has no public call (0.42)."""
    from diffusers.hooks import HookRegistry

    hooks = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
    for name in names:
        registry = HookRegistry.check_if_exists_or_initialize(pipe.components[name])
        for hook in hooks:
            registry.remove_hook(hook, recurse=True)
