"""NVIDIA cards, read through NVML: no CUDA context is made, so what is free stays free."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vramplan.hardware.types import Accelerator, Host
from vramplan.hardware.visible import visible_positions
from vramplan.units import MIB

# Bytes per second one way on one lane, after line coding, by PCIe generation (PCI-SIG base specifications:
# 8b/10b for 1 and 2, 128b/130b for 3 to 5, 242 of 256 bytes of a flit for 6).
_LANE_RATES = {
    1: 2.5e9 * 8 / 10 / 8,
    2: 5e9 * 8 / 10 / 8,
    3: 8e9 * 128 / 130 / 8,
    4: 16e9 * 128 / 130 / 8,
    5: 32e9 * 128 / 130 / 8,
    6: 64e9 * 242 / 256 / 8,
}

_KERNEL_DRIVER = Path("/proc/driver/nvidia/version")


def probe(host: Host) -> Iterator[Accelerator | str]:
    """The NVIDIA cards this process will see, in CUDA's numbering, and notes on what could not be read."""
    try:
        nvml = _import_nvml()
    except ImportError:
        yield "nvidia: the module pynvml is missing, no card was looked for: pip install nvidia-ml-py"
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        yield from _no_driver(nvml, error)
        return
    try:
        yield from _cards(nvml, host)
    except nvml.NVMLError as error:
        yield f"nvidia: the cards could not be listed ({error})"
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _import_nvml() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the retired package of the same module name warns when imported
        import pynvml
    return pynvml


def _no_driver(nvml: Any, error: Exception) -> Iterator[str]:
    """Nothing where there is no driver at all: most machines have none, and that is no fault."""
    if not isinstance(error, nvml.NVMLError_LibraryNotFound):
        yield f"nvidia: the driver does not answer ({error}); see whether nvidia-smi works"
    elif _KERNEL_DRIVER.exists():
        yield (
            "nvidia: a driver is loaded but its library libnvidia-ml was not found; "
            "in a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        )


def _cards(nvml: Any, host: Host) -> Iterator[Accelerator | str]:
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    uuids = [_uuid(nvml, position) for position in range(nvml.nvmlDeviceGetCount())]
    positions = visible_positions(wanted, uuids)
    yield from _doubts(wanted, len(uuids), len(positions))
    for index, position in enumerate(positions):
        try:
            yield _card(nvml, host, nvml.nvmlDeviceGetHandleByIndex(position), index)
        except nvml.NVMLError as error:
            yield f"nvidia: card {index} could not be read ({error}); it is left out"


def _uuid(nvml: Any, position: int) -> str | None:
    handle = _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, position)
    return _text(_ask(nvml, nvml.nvmlDeviceGetUUID, handle)) if handle is not None else None


def _doubts(wanted: str | None, count: int, visible: int) -> Iterator[str]:
    """Notes on where NVML and CUDA may not speak of the same cards."""
    named = (wanted or "").startswith("GPU-")
    if "MIG-" in (wanted or ""):
        yield "nvidia: CUDA_VISIBLE_DEVICES names a MIG instance; MIG instances are not read yet"
    # One visible card is in doubt too: CUDA_VISIBLE_DEVICES=1 counts in CUDA's order, and identifiers do not.
    if visible and count > 1 and not named and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        yield (
            f"nvidia: the {count} cards are numbered in PCI bus order here, but CUDA puts the fastest first, "
            "so an index may mean another card: set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )


def _card(nvml: Any, host: Host, handle: Any, index: int) -> Accelerator | str:
    """The card; a note where it is one that cannot be planned for. An unreadable memory is an NVMLError."""
    name = _text(_ask(nvml, nvml.nvmlDeviceGetName, handle)) or "NVIDIA GPU"
    mode = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle)
    if mode and mode[0]:
        return f"nvidia: {name} (card {index}) is split into MIG instances, which are not read yet"
    total, free, unified = _memory(nvml, host, handle)
    return Accelerator(
        kind="cuda",
        index=index,
        name=name,
        uuid=_text(_ask(nvml, nvml.nvmlDeviceGetUUID, handle)),
        total_bytes=total,
        free_bytes=free,
        unified=unified,
        driver=_text(_ask(nvml, nvml.nvmlSystemGetDriverVersion)),
        link_bytes_per_s=_link_rate(nvml, handle),
        drives_display=_drives_display(nvml, handle),
    )


def _drives_display(nvml: Any, handle: Any) -> bool | None:
    """Whether a desktop is drawn on the card, with or without a monitor; None where the driver does not say."""
    active = _ask(nvml, nvml.nvmlDeviceGetDisplayActive, handle)
    return None if active is None else bool(active)


def _memory(nvml: Any, host: Host, handle: Any) -> tuple[int, int, bool]:
    """Total, free and whether the card shares the host's memory.

    Drivers disagree on chips without memory of their own (GB10, Jetson): some say "not supported"
    (https://docs.nvidia.com/dgx/dgx-spark/known-issues.html), some give the host's total, with a free that
    leaves out the page cache (XuehaiPan/nvitop#208). In both cases the host's own numbers are the true ones.
    """
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:
        return host.total_bytes, host.available_bytes, True
    if abs(memory.total - host.total_bytes) < MIB:
        return host.total_bytes, host.available_bytes, True
    return int(memory.total), int(memory.free), False


def _link_rate(nvml: Any, handle: Any) -> float | None:
    """Bytes per second one way.

    The current generation falls while the card idles, so the highest that card and slot agree on is taken
    (NVIDIA/open-gpu-kernel-modules#731). The width does not fall, and the current one knows an x4 slot.
    """
    generation = _ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle)
    width = _ask(nvml, nvml.nvmlDeviceGetCurrPcieLinkWidth, handle) or _ask(
        nvml, nvml.nvmlDeviceGetMaxPcieLinkWidth, handle
    )
    rate = _LANE_RATES.get(generation or 0)
    return rate * width if rate and width else None


def _ask(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """NVML's answer, None where it has none: no single fact is worth losing the card for."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None


def _text(value: str | bytes | None) -> str | None:
    """Text from bytes, which the oldest releases of nvidia-ml-py give."""
    return value.decode() if isinstance(value, bytes) else value
