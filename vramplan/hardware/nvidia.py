"""NVIDIA cards and MIG instances, read through NVML, which makes no CUDA context and so takes no memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vramplan.hardware.merge import merge_candidates
from vramplan.hardware.nvidia_facts import card_facts
from vramplan.hardware.nvidia_nvml import ask, import_nvml, nvml_session, to_text, whole_number
from vramplan.hardware.nvidia_order import Order, Unit, cuda_order
from vramplan.hardware.process_usage import process_usage
from vramplan.hardware.sampling import low_median, samples, spread
from vramplan.hardware.sysroot import exists, system_path
from vramplan.hardware.system import is_wsl
from vramplan.hardware.torch_devices import torch_backends
from vramplan.hardware.types import Accelerator, Host, Reading
from vramplan.units import MIB, format_bytes

_KERNEL_DRIVER = "/proc/driver/nvidia/version"
_MOST_BYTES = 1 << 50  # a pebibyte: NVML's answers above this, or negative, are wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """A card or a MIG instance: its handle, the handle of its card, and its bus address."""

    handle: Any
    card: Any
    bus: str
    name: Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memory:
    """Total bytes, and free bytes in each reading; `shared` if the memory is the host's."""

    total: int
    free: list[int | None]
    shared: bool


def probe(host: Host) -> Iterator[Accelerator | str]:
    """Detect the NVIDIA devices visible to this process, in CUDA's numbering; texts are notes on failed readings."""
    try:
        nvml = import_nvml()
    except ImportError:
        yield "nvidia: the module pynvml is missing, no card was looked for: pip install nvidia-ml-py"
        return
    seen = False
    try:
        with nvml_session(nvml):
            for item in _devices(nvml, host):
                seen = seen or isinstance(item, Accelerator)
                yield item
    except nvml.NVMLError_LibraryNotFound:
        yield from _probe_without_nvml(host)
    except nvml.NVMLError as error:
        yield f"nvidia: the driver does not answer ({error}); see whether nvidia-smi works"
    if seen:
        yield from _torch_note()


def _torch_note() -> Iterator[str]:
    """A note if the installed torch is built without CUDA, like PyPI's on Windows."""
    built = torch_backends()
    if built is not None and "cuda" not in built:
        what = "for AMD cards" if "hip" in built else "for Intel cards" if "xpu" in built else "for the processor alone"
        yield (
            f"nvidia: a card is here, but the installed torch is built {what}: "
            "https://pytorch.org/get-started/locally has the command for one that uses it"
        )


def _probe_without_nvml(host: Host) -> Iterator[Accelerator | str]:
    """Detect a Jetson, whose older systems have no NVML; else a note if an NVIDIA driver is loaded."""
    from vramplan.hardware.nvidia_jetson import jetson

    board = jetson(host)
    if board is not None:
        yield board
    elif exists(system_path(_KERNEL_DRIVER)):
        yield (
            "nvidia: a driver is loaded but its library libnvidia-ml was not found; "
            "in a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        )


def _devices(nvml: Any, host: Host) -> Iterator[Accelerator | str]:
    cards = _cards(nvml)
    units = [unit for card in cards for unit in card.units()]
    order = cuda_order([unit.name for unit in units])
    yield from order.notes
    yield from _visibility_notes(cards, units, order)
    wanted = sorted({position for candidates in order.candidates for position in candidates})
    memories, lost = _memories(nvml, host, [units[position] for position in wanted])
    known = dict(zip(wanted, memories, strict=True))
    for index, candidates in enumerate(order.candidates):
        found = [
            _device(nvml, host, units[position], memory, index)
            for position in candidates
            if (memory := known[position]) is not None
        ]
        if not found:
            yield f"nvidia: card {index} could not be read ({lost}); it is left out"
            continue
        device = merge_candidates(found)
        yield from _device_notes(nvml, device, [known[position] for position in candidates], units[candidates[0]])
        yield device


def _cards(nvml: Any) -> list[_Card]:
    """The cards this process may use, in PCI order. Raises NVMLError."""
    cards = [_Card(nvml, position) for position in range(whole_number(nvml.nvmlDeviceGetCount(), most=1024) or 0)]
    return sorted((card for card in cards if not card.forbidden), key=lambda card: card.bus)


class _Card:
    """One card of NVML's. A `forbidden` one is denied to this process by a container or a batch system, and counted by
    NVML but not by CUDA (NVML API reference, nvmlDeviceGetCount_v2)."""

    def __init__(self, nvml: Any, position: int) -> None:
        self.nvml = nvml
        self.handle, self.forbidden = None, False
        try:
            self.handle = nvml.nvmlDeviceGetHandleByIndex(position)
        except nvml.NVMLError_NoPermission:
            self.forbidden = True
        except nvml.NVMLError:  # a lost card is reported when its memory is read
            pass
        pci = ask(nvml, "nvmlDeviceGetPciInfo", self.handle)
        # Without an address the cards stay in NVML's order, which is believed to be the bus order.
        self.bus = (to_text(getattr(pci, "busId", None)) or f"{position:08}").lower()
        self.uuid = to_text(ask(nvml, "nvmlDeviceGetUUID", self.handle))

    def units(self) -> list[_Unit]:
        mode = ask(self.nvml, "nvmlDeviceGetMigMode", self.handle)
        if not (isinstance(mode, Sequence) and mode and mode[0] == 1):
            return [_Unit(handle=self.handle, card=self.handle, bus=self.bus, name=Unit(uuid=self.uuid))]
        count = whole_number(ask(self.nvml, "nvmlDeviceGetMaxMigDeviceCount", self.handle), most=64) or 0
        found = (ask(self.nvml, "nvmlDeviceGetMigDeviceHandleByIndex", self.handle, slot) for slot in range(count))
        return [self._part(handle) for handle in found if handle is not None]

    def _part(self, handle: Any) -> _Unit:
        group = ask(self.nvml, "nvmlDeviceGetGpuInstanceId", handle)
        compute = ask(self.nvml, "nvmlDeviceGetComputeInstanceId", handle)
        name = Unit(
            uuid=to_text(ask(self.nvml, "nvmlDeviceGetUUID", handle)),
            is_part=True,
            card=self.uuid,
            old_name=f"MIG-{self.uuid}/{group}/{compute}",
        )
        return _Unit(handle=handle, card=self.handle, bus=self.bus, name=name)


def _visibility_notes(cards: Sequence[_Card], units: Sequence[_Unit], order: Order) -> Iterator[str]:
    """Notes on why cards give no device: a variable hides them, or MIG mode has no instance."""
    if units and not order.candidates and not order.notes:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        source = f"CUDA_VISIBLE_DEVICES={visible}" if visible is not None else "CUDA itself"
        yield f"nvidia: {source} shows none of the {len(units)} device(s) here"
    if cards and not units:
        yield (
            f"nvidia: all of the {len(cards)} card(s) are in MIG mode and have no instance this process may use: "
            "make one with nvidia-smi mig, or switch MIG off"
        )


def _memories(nvml: Any, host: Host, units: Sequence[_Unit]) -> tuple[list[_Memory | None], str]:
    """The memory of each unit, read in several rounds, None for one that failed; and the reason of the last failure."""
    losses = ["it does not answer"]

    def once() -> list[_Memory | None]:
        return [_memory(nvml, host, unit, losses) for unit in units]

    rounds = samples(once) if units else []
    merged: list[_Memory | None] = []
    for readings in zip(*rounds, strict=True):
        good = [reading for reading in readings if reading is not None]
        free = [value for reading in good for value in reading.free]
        merged.append(replace(good[-1], free=free) if good else None)
    return merged, losses[-1]


def _memory(nvml: Any, host: Host, unit: _Unit, losses: list[str]) -> _Memory | None:
    """Read the memory of a unit once; None if that fails, with the reason appended to `losses`.

    Drivers disagree on chips without memory of their own (GB10, Jetson): some say "not supported"
    (https://docs.nvidia.com/dgx/dgx-spark/known-issues.html), some give the host's total, and count the page cache as
    used (XuehaiPan/nvitop#208). In both cases the host's own numbers are right.
    """
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(unit.handle)
    except nvml.NVMLError_NotSupported:
        return _Memory(total=host.total_bytes, free=[], shared=True)
    except nvml.NVMLError as error:
        losses.append(str(error))
        return None
    total, free = (whole_number(getattr(memory, name, None), most=_MOST_BYTES) for name in ("total", "free"))
    if not total:
        losses.append("it names no memory")
        return None
    return _Memory(total=total, free=[free], shared=_is_host_memory(nvml, unit, total, host))


def _is_host_memory(nvml: Any, unit: _Unit, total: int, host: Host) -> bool:
    """Whether the memory is the host's: of equal size, or nearly (nvitop takes 90 %) with one address space."""
    one_space = ask(nvml, "nvmlDeviceGetAddressingMode", unit.card) == getattr(
        nvml, "NVML_DEVICE_ADDRESSING_MODE_ATS", 2
    )
    nearly = host.total_bytes * 0.9 <= total <= host.total_bytes
    return abs(total - host.total_bytes) < MIB or (one_space and nearly)


def _device(nvml: Any, host: Host, unit: _Unit, memory: _Memory, index: int) -> Accelerator:
    facts = card_facts(nvml, unit.handle, unit.card, is_part=unit.name.is_part)
    total = host.total_bytes if memory.shared else memory.total
    own, own_readings = process_usage("cuda", index, total)
    nvml_free = low_median(memory.free)
    readings = [] if nvml_free is None else [Reading(source="NVML", free_bytes=min(nvml_free, total))]
    readings += own_readings
    if memory.shared:
        readings.append(Reading(source="available on the host", free_bytes=min(host.available_bytes, total)))
    free, reason = _choose_free(readings, shared=memory.shared)
    if own is not None and free is not None and own.cached_bytes and not memory.shared:
        free, reason = min(total, free + own.cached_bytes), f"{reason}; with what this process has cached"
    coherent = facts.pop("one_space") and not memory.shared
    return Accelerator(
        kind="cuda",
        index=index,
        uuid=unit.name.uuid,
        total_bytes=total,
        free_bytes=free,
        unified=memory.shared,
        coherent=coherent,
        free_readings=tuple(readings),
        free_reason=reason,
        own=own,
        **facts,
    )


def _choose_free(readings: Sequence[Reading], *, shared: bool) -> tuple[int | None, str | None]:
    """The free bytes to plan with, and the reason."""
    if shared:
        return readings[-1].free_bytes, "the memory is the host's, whose file cache the device's driver counts as used"
    if not readings:
        return None, None
    least = min(readings, key=lambda reading: reading.free_bytes)
    if len(readings) == 1:
        return least.free_bytes, "the middle of three readings"
    return least.free_bytes, f"the least of {len(readings)} sources"


def _device_notes(nvml: Any, device: Accelerator, memories: Sequence[_Memory | None], unit: _Unit) -> Iterator[str]:
    """Notes on the device that qualify its numbers."""
    span = spread(memories[0].free) if len(memories) == 1 and memories[0] and not device.unified else None
    if span:
        low, high = map(format_bytes, span)
        yield f"nvidia: what is free on {device.device} moved between {low} and {high} while it was read"
    if device.spills and is_wsl():
        yield (
            f"nvidia: {device.device} is behind Windows: too much memory is no error but goes to host memory, about "
            "eight times as slow, and WSL2 does not go by the setting against it (microsoft/WSL#11050)"
        )
    elif device.spills:
        yield (
            f"nvidia: on {device.device} too much memory is no error but goes to host memory, about eight times as "
            "slow: NVIDIA Control Panel, Manage 3D settings, CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback"
        )
    if device.part == "vGPU":
        yield f"nvidia: {device.device} is a vGPU: pinned and managed memory may be missing or limited by its host"
