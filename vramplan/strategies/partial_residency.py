"""Partial residency: most blocks stay on the device, the others are streamed in while those in between compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vramplan.hardware.types import Accelerator
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.strategies import disk as files
from vramplan.strategies.base import DIFFUSERS_HOOK, Axis, Hold, Quality, offload_refusal, remove_group_hooks
from vramplan.strategies.group_offload import LOW_CPU_MEM_RATE, WORTH_A_FILE
from vramplan.units import GIB

if TYPE_CHECKING:
    import torch

# Blocks smaller than this share of the largest stay: waiting for one costs more than its memory is worth.
_WORTH_STREAMING = 0.25
# Two streamed blocks are on the device at once, so fewer than three save nothing; with files only one is.
_LEAST = 3
_LEAST_IN_FILES = 2
# Smaller encoders are not cut: they run once per call, and weigh little next to a denoiser.
_WORTH_CUTTING = 2 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialResidency:
    """`streamed` of the component's blocks come to the device while they run, the rest of it stays there.

    Large blocks count by their pieces (`Geometry.units`). With `low_cpu_mem_usage` blocks are page-locked on the fly,
    which is slower and takes less RAM: page-locked copies are rounded up to powers of two. With `disk` they are kept in
    files and read straight to the device, without overlap; files are removed after reading back, or with the process.
    diffusers groups all blocks or none (0.42, `apply_group_offloading`); this puts its hooks and groups, with streams
    and prefetching, on the streamed blocks only. They are spread evenly, so that each is copied while others run.
    """

    name: ClassVar[str] = "partial_residency"
    axis: ClassVar[Axis] = "placement"
    stock: ClassVar[bool] = False
    quality: ClassVar[Quality] = "lossless"
    whole_pipeline: ClassVar[bool] = False
    freed: ClassVar[bool] = False
    direct: ClassVar[bool] = False
    leaves: ClassVar[tuple[str, ...]] = DIFFUSERS_HOOK

    streamed: int = 0
    low_cpu_mem_usage: bool = False
    disk: bool = False

    @property
    def ladder(self) -> str:
        """One ladder with page-locked copies, one that page-locks on the fly, and one with files."""
        return f"{self.name} {self.low_cpu_mem_usage} {self.disk}"

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """Every number of streamed blocks that saves memory, the smallest peak first.

        If blocks differ in size, streaming more of them may save less, or move more for the same: such numbers are
        left out. An encoder that takes too much RAM when page-locked is better read once, or from files.
        """
        denoiser, size = component.role in ("denoiser", "control"), component.weight_bytes
        if not denoiser and (component.role not in ("text_encoder", "image_encoder") or size < _WORTH_CUTTING):
            return ()
        kinds = [
            cls(),
            *([cls(low_cpu_mem_usage=True)] if denoiser else []),
            *([cls(disk=True)] * (size >= WORTH_A_FILE)),
        ]
        return [replace(kind, streamed=count) for kind in kinds for count in kind._counts(component.geometry.units)]

    def _counts(self, sizes: Sequence[int]) -> list[int]:
        """Return the numbers of streamed blocks worth trying, the largest saving first."""
        found = []
        for count in range(self._least, len(_worth_streaming(sizes)) + 1):
            chosen = spread_evenly(sizes, count)
            found.append((self._saved_bytes(sizes, chosen), -sum(sizes[place] for place in chosen), -count))
        counts, least_moved = [], None
        for saved, moved, count in sorted(found, reverse=True):
            if saved > 0 and (least_moved is None or moved > least_moved):
                counts.append(-count)
                least_moved = moved
        return counts

    @property
    def _least(self) -> int:
        return _LEAST_IN_FILES if self.disk else _LEAST

    def _saved_bytes(self, sizes: Sequence[int], chosen: Sequence[int]) -> int:
        """Return the bytes off the device while it runs: the streamed blocks except the largest two in sequence; with
        files, except the largest one."""
        moved = sum(sizes[place] for place in chosen)
        if self.disk:
            return moved - max((sizes[place] for place in chosen), default=0)
        return moved - max((sizes[one] + sizes[two] for one, two in pairwise(chosen)), default=moved)

    def complete(self, component: Component) -> Self:
        """Return the setting unchanged."""
        return self

    def unpinned(self) -> Self:
        """Return the setting that page-locks on the fly, unless it uses files."""
        return replace(self, low_cpu_mem_usage=not self.disk)

    def refusal(self, component: Component, spec: PipelineSpec, accelerator: Accelerator | None) -> str | None:
        """Refuse components that cannot be offloaded by block, and numbers of blocks out of range."""
        most, least = len(_worth_streaming(component.geometry.units)), self._least
        if self.disk and self.low_cpu_mem_usage:
            return (
                "low_cpu_mem_usage is for blocks that are pinned: with disk=true they are read straight to the device"
            )
        if component.role == "vae":
            return "decode() never runs the hook that wires the prefetching: a VAE cannot be streamed"
        if most < least:
            return f"{component.class_name} has {most} blocks worth streaming; partial residency needs {least}"
        if not least <= self.streamed <= most:
            return f"streamed={self.streamed}: {component.class_name} can stream {least} to {most} of its blocks"
        if not self.disk and (accelerator is None or not accelerator.has_streams):
            return "partial residency needs a device with streams (CUDA, ROCm or XPU), or disk=true"
        return (
            component.group_offload_refusal
            or component.block_offload_refusal
            or component.leaf_offload_refusal
            or (component.disk_offload_refusal if self.disk else None)
            or offload_refusal(component, spec, accelerator)
        )

    def hold(self, component: Component, spec: PipelineSpec) -> Hold:
        """All but the streamed blocks while idle; in addition the largest two in sequence while it runs.

        Each streamed block is page-locked before the next one is read: no block is in RAM twice. With files one block
        is on the device at a time, and passes through RAM.
        """
        geometry = component.geometry
        sizes = geometry.units
        chosen = spread_evenly(sizes, self.streamed)
        moved = sum(sizes[place] for place in chosen)
        running, idle = component.weight_bytes - self._saved_bytes(sizes, chosen), component.weight_bytes - moved
        if self.disk:
            return Hold(
                running_bytes=running,
                idle_bytes=idle,
                host_transient_bytes=max(sizes[place] for place in chosen),
                disk_bytes=moved,
                pauses=self.streamed,
            )
        return Hold(
            running_bytes=running,
            idle_bytes=idle,
            host_bytes=moved if self.low_cpu_mem_usage else 0,
            pinned_bytes=0 if self.low_cpu_mem_usage else sum(geometry.pinned_units[place] for place in chosen),
            moved_in_bytes=moved,
            overlapped=True,
            pauses=self.streamed,
            rate=LOW_CPU_MEM_RATE["block"] if self.low_cpu_mem_usage else 1.0,
        )

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Put diffusers' hooks on each component."""
        for name in names:
            apply_partial_residency(pipe.components[name], device, **self._options(name))

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Remove diffusers' hooks, after reading weights in files back to the CPU."""
        if self.disk:
            for name in names:
                files.bring_back(pipe.components[name])
        remove_group_hooks(pipe, names)

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """An import and one call for each component."""
        options = {name: ", ".join(f"{key}={item!r}" for key, item in self._options(name).items()) for name in names}
        calls = [f'apply_partial_residency(pipe.{name}, "{device}", {given})' for name, given in options.items()]
        return [f"from {__name__} import apply_partial_residency", *calls]

    def _options(self, name: str) -> dict[str, Any]:
        options: dict[str, Any] = {"streamed": self.streamed}
        options |= {"low_cpu_mem_usage": True} if self.low_cpu_mem_usage else {}
        return options | ({"disk": name} if self.disk else {})


def apply_partial_residency(
    module: torch.nn.Module, device: str, streamed: int, *, low_cpu_mem_usage: bool = False, disk: str = ""
) -> None:
    """Stream `streamed` of the module's blocks to the device as they run, and move the rest of it there.

    With `low_cpu_mem_usage` they are page-locked on the fly instead of once. With `disk`, a name for the module, they
    are kept in files of their own directory. On the CPU the same hooks run without a stream.

    Raises:
        ValueError: more blocks than the module has. VramplanError: the files cannot be written.
    """
    import torch

    from vramplan.pipeline.geometry import module_bytes, units_of

    blocks = units_of(module)
    chosen = [blocks[place] for place in spread_evenly([module_bytes(block) for block in blocks], streamed)]
    target = torch.device(device)
    with files.own_folder(module, disk, chosen) if disk else nullcontext() as folder:
        _hook(module, chosen, target, low_cpu_mem_usage, None if folder is None else str(folder))
    _move_all_but(module, {id(block) for block in chosen}, target)


def spread_evenly(sizes: Sequence[int], count: int) -> list[int]:
    """Return the indices of `count` blocks of these sizes, spread evenly, with a gap before the first.

    Raises:
        ValueError: fewer blocks are worth streaming.
    """
    worth = _worth_streaming(sizes)
    if count > len(worth):
        raise ValueError(f"{count} blocks to stream, but there are {len(worth)}")
    return [worth[(number + 1) * len(worth) // count - 1] for number in range(count)]


def _worth_streaming(sizes: Sequence[int]) -> list[int]:
    least = max(sizes, default=0) * _WORTH_STREAMING
    return [place for place, size in enumerate(sizes) if size >= least and size]


def _hook(
    module: torch.nn.Module, chosen: Sequence[torch.nn.Module], device: torch.device, low: bool, folder: str | None
) -> None:
    """Put diffusers' hooks on the chosen blocks, and on the module one that finds their order and prefetches.

    Files are read without a stream, which would read to RAM first, on the thread that launches kernels.
    """
    import torch
    from diffusers.hooks import HookRegistry, group_offloading

    offload_device = torch.device("cpu")
    streams = device.type != "cpu" and folder is None
    stream = group_offloading.TorchDeviceBackend(device).Stream() if streams else None
    config = group_offloading.GroupOffloadingConfig(
        onload_device=device,
        offload_device=offload_device,
        offload_type=group_offloading.GroupOffloadingType.BLOCK_LEVEL,
        non_blocking=False,
        record_stream=False,
        low_cpu_mem_usage=low,
        num_blocks_per_group=1,
        offload_to_disk_path=folder,
        stream=stream,
        exclude_kwargs=getattr(module, "_skip_keys", None),
    )

    def hook(leader: torch.nn.Module, modules: list[torch.nn.Module], side: Any, path: str | None) -> None:
        group = group_offloading.ModuleGroup(
            modules=modules,
            offload_device=offload_device,
            onload_device=device,
            offload_leader=leader,
            onload_leader=leader,
            stream=side,
            low_cpu_mem_usage=low,
            offload_to_disk_path=path,
        )
        registry = HookRegistry.check_if_exists_or_initialize(leader)
        registry.register_hook(group_offloading.GroupOffloadingHook(group, config=config), "group_offloading")

    for block in chosen:
        hook(block, [block], stream, folder)
    hook(module, [], None, None)
    if stream is not None:
        prefetch = group_offloading.LazyPrefetchGroupOffloadingHook()
        HookRegistry.check_if_exists_or_initialize(module).register_hook(prefetch, "lazy_prefetch_group_offloading")


def _move_all_but(module: torch.nn.Module, kept: set[int], device: torch.device) -> None:
    """Move the tensors outside of the kept modules."""
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
