"""Partial residency: most blocks stay on the device, the others are streamed in behind the compute of those between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vramplan.hardware.types import Accelerator
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.strategies.base import Axis, Hold, Quality, offload_refusal, remove_group_hooks
from vramplan.strategies.group_offload import LOW_CPU_MEM_RATE

if TYPE_CHECKING:
    import torch

# Blocks smaller than this share of the largest stay: waiting for one costs more than it weighs.
_WORTH_STREAMING = 0.25
# Two of the streamed blocks are on the device at once, so that less than three save nothing.
_LEAST = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialResidency:
    """`streamed` of the component's blocks come to the device while they run, the rest of it stays there.

    Large blocks count by the pieces they consist of (`Geometry.units`). With `low_cpu_mem_usage` they are pinned on
    the fly, which is slower and takes less RAM: pinned copies are rounded up to powers of two.
    diffusers has groups of all blocks or of none (0.42, `apply_group_offloading`); this puts its own hooks and
    groups, with streams and prefetching, on the streamed blocks alone. They are spread evenly, so that each is
    copied while those before it run.
    """

    name: ClassVar[str] = "partial_residency"
    axis: ClassVar[Axis] = "placement"
    quality: ClassVar[Quality] = "lossless"
    whole_pipeline: ClassVar[bool] = False
    freed: ClassVar[bool] = False
    direct: ClassVar[bool] = False

    streamed: int = 0
    low_cpu_mem_usage: bool = False

    @property
    def ladder(self) -> str:
        """One with pinned copies, and one that pins on the fly."""
        return f"{self.name} {self.low_cpu_mem_usage}"

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """Every number of streamed blocks that saves memory, the smallest amount of memory first.

        Where blocks differ in size, streaming more of them may save less, or move more for the same: such numbers are
        left out.
        """
        if component.role not in ("denoiser", "control"):
            return ()
        sizes = component.geometry.units
        found = []
        for count in range(_LEAST, len(_worth_streaming(sizes)) + 1):
            chosen = spread(sizes, count)
            found.append((_saved_bytes(sizes, chosen), -sum(sizes[place] for place in chosen), -count))
        counts, least_moved = [], None
        for saved, moved, count in sorted(found, reverse=True):  # what saves most first
            if saved > 0 and (least_moved is None or moved > least_moved):
                counts.append(-count)
                least_moved = moved
        return [cls(streamed=count, low_cpu_mem_usage=low) for low in (False, True) for count in counts]

    def complete(self, component: Component) -> Self:
        """The setting as it is."""
        return self

    def unpinned(self) -> Self:
        """Pinned on the fly."""
        return replace(self, low_cpu_mem_usage=True)

    def refusal(self, component: Component, spec: PipelineSpec, accelerator: Accelerator | None) -> str | None:
        """What keeps groups of blocks off the component, and numbers of blocks it does not have."""
        most = len(_worth_streaming(component.geometry.units))
        if component.role == "vae":
            return "decode() never runs the hook that wires the prefetching: a VAE cannot be streamed"
        if most < _LEAST:
            return f"{component.class_name} has {most} blocks worth streaming; partial residency needs {_LEAST}"
        if not _LEAST <= self.streamed <= most:
            return f"streamed={self.streamed}: {component.class_name} can stream {_LEAST} to {most} of its blocks"
        if accelerator is None or not accelerator.has_streams:
            return "partial residency needs a device with streams (CUDA, ROCm or XPU)"
        return (
            component.group_offload_refusal
            or component.block_offload_refusal
            or component.leaf_offload_refusal
            or offload_refusal(component, spec, accelerator)
        )

    def hold(self, component: Component, spec: PipelineSpec) -> Hold:
        """All but the streamed blocks always; the largest two of those that follow each other while it runs.

        Each streamed block is pinned before the next one is read: nothing is needed twice.
        """
        geometry = component.geometry
        sizes = geometry.units
        chosen = spread(sizes, self.streamed)
        moved = sum(sizes[place] for place in chosen)
        return Hold(
            running_bytes=component.weight_bytes - _saved_bytes(sizes, chosen),
            idle_bytes=component.weight_bytes - moved,
            host_bytes=moved if self.low_cpu_mem_usage else 0,
            pinned_bytes=0 if self.low_cpu_mem_usage else sum(geometry.pinned_units[place] for place in chosen),
            moved_in_bytes=moved,
            overlapped=True,
            pauses=self.streamed,
            rate=LOW_CPU_MEM_RATE["block"] if self.low_cpu_mem_usage else 1.0,
        )

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Component by component, with diffusers' hooks."""
        for name in names:
            apply_partial_residency(
                pipe.components[name], device, self.streamed, low_cpu_mem_usage=self.low_cpu_mem_usage
            )

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Take diffusers' hooks off."""
        remove_group_hooks(pipe, names)

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """An import and one call for each component."""
        options = f"streamed={self.streamed}" + (", low_cpu_mem_usage=True" if self.low_cpu_mem_usage else "")
        calls = [f'apply_partial_residency(pipe.{name}, "{device}", {options})' for name in names]
        return [f"from {__name__} import apply_partial_residency", *calls]


def apply_partial_residency(
    module: torch.nn.Module, device: str, streamed: int, *, low_cpu_mem_usage: bool = False
) -> None:
    """Stream `streamed` of the module's blocks to the device as they run, and move all the rest of it there.

    With `low_cpu_mem_usage` they are pinned on the fly instead of once. On the CPU the same hooks run without a stream.

    Raises:
        ValueError: more blocks than the module has.
    """
    import torch

    from vramplan.pipeline.geometry import module_bytes, units_of

    blocks = units_of(module)
    chosen = [blocks[place] for place in spread([module_bytes(block) for block in blocks], streamed)]
    target = torch.device(device)
    _hook(module, chosen, target, low_cpu_mem_usage)
    _move_all_but(module, {id(block) for block in chosen}, target)


def spread(sizes: Sequence[int], count: int) -> list[int]:
    """The places of `count` blocks of these sizes, as far from each other as can be, with room before the first.

    Raises:
        ValueError: there are not so many blocks worth streaming.
    """
    worth = _worth_streaming(sizes)
    if count > len(worth):
        raise ValueError(f"{count} blocks to stream, but there are {len(worth)}")
    return [worth[(number + 1) * len(worth) // count - 1] for number in range(count)]


def _saved_bytes(sizes: Sequence[int], chosen: Sequence[int]) -> int:
    """What is not on the device while it runs: the streamed blocks but the largest two that follow each other."""
    moved = sum(sizes[place] for place in chosen)
    return moved - max((sizes[one] + sizes[two] for one, two in pairwise(chosen)), default=moved)


def _worth_streaming(sizes: Sequence[int]) -> list[int]:
    least = max(sizes, default=0) * _WORTH_STREAMING
    return [place for place, size in enumerate(sizes) if size >= least and size]


def _hook(module: torch.nn.Module, chosen: Sequence[torch.nn.Module], device: torch.device, low: bool) -> None:
    """diffusers' hooks on the chosen blocks, and on the module one that finds their order and prefetches."""
    import torch
    from diffusers.hooks import HookRegistry, group_offloading

    offload_device = torch.device("cpu")
    stream = None if device.type == "cpu" else group_offloading.TorchDeviceBackend(device).Stream()
    config = group_offloading.GroupOffloadingConfig(
        onload_device=device,
        offload_device=offload_device,
        offload_type=group_offloading.GroupOffloadingType.BLOCK_LEVEL,
        non_blocking=False,
        record_stream=False,
        low_cpu_mem_usage=low,
        num_blocks_per_group=1,
        stream=stream,
        exclude_kwargs=getattr(module, "_skip_keys", None),
    )

    def hook(leader: torch.nn.Module, modules: list[torch.nn.Module], side: Any) -> None:
        group = group_offloading.ModuleGroup(
            modules=modules,
            offload_device=offload_device,
            onload_device=device,
            offload_leader=leader,
            onload_leader=leader,
            stream=side,
            low_cpu_mem_usage=low,
        )
        registry = HookRegistry.check_if_exists_or_initialize(leader)
        registry.register_hook(group_offloading.GroupOffloadingHook(group, config=config), "group_offloading")

    for block in chosen:
        hook(block, [block], stream)
    hook(module, [], None)
    if stream is not None:
        prefetch = group_offloading.LazyPrefetchGroupOffloadingHook()
        HookRegistry.check_if_exists_or_initialize(module).register_hook(prefetch, "lazy_prefetch_group_offloading")


def _move_all_but(module: torch.nn.Module, kept: set[int], device: torch.device) -> None:
    """Move what no kept module holds."""
    if id(module) in kept:
        return
    if not any(id(child) in kept for child in module.modules()):
        module.to(device)
        return
    for tensor in _own_tensors(module):
        tensor.data = tensor.data.to(device)
    for child in module.children():
        _move_all_but(child, kept, device)


def _own_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
