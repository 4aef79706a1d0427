"""Facts of a card by NVML, other than its memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from vramplan.hardware.nvidia_nvml import ask, to_text, whole_number
from vramplan.hardware.pcie import link_rate
from vramplan.hardware.sysroot import read_text, system_path
from vramplan.hardware.system import is_wsl
from vramplan.hardware.types import Pcie, Peer, Process

# The most links of any card so far is 18 (NVIDIA H100 data sheet); NVML_NVLINK_MAX_LINKS is 36.
_MOST_LINKS = 36
# Field numbers (nvml.h): the number of chip-to-chip links, whether one is active, and its MB/s.
_C2C_COUNT, _C2C_STATUS, _C2C_RATE = 170, 171, 172
# The first compute capability with arithmetic in each dtype (CUDA C++ Programming Guide, arithmetic instructions;
# float8: tensor cores from 8.9 on, PTX ISA, mma).
_NATIVE_FROM = {
    "float32": (0, 0),
    "float16": (5, 3),
    "bfloat16": (8, 0),
    "float8_e4m3fn": (8, 9),
    "float8_e5m2": (8, 9),
}
_WITHOUT_HALF = (6, 1)  # GeForce and Tesla P4/P40 of Pascal run float16 at a 64th of the rate: too slow to count


def card_facts(nvml: Any, handle: Any, card: Any, *, is_part: bool) -> dict[str, Any]:
    """The facts by their field names in Accelerator, and `one_space`: device and host share one address space.

    A part of a card has its own name and its own programs; the other facts are the card's.
    """
    capability = _capability(nvml, card)
    link = pcie_link(nvml, card)
    one_space = ask(nvml, "nvmlDeviceGetAddressingMode", card) == getattr(nvml, "NVML_DEVICE_ADDRESSING_MODE_ATS", 2)
    # On boards with GPU and CPU, copies use the chip-to-chip link, not PCI Express.
    chip_to_chip = chip_link_rate(nvml, card)
    return {
        "name": to_text(ask(nvml, "nvmlDeviceGetName", handle))
        or to_text(ask(nvml, "nvmlDeviceGetName", card))
        or "NVIDIA GPU",
        "part": "MIG instance" if is_part else _vgpu(nvml, card),
        "driver": to_text(ask(nvml, "nvmlSystemGetDriverVersion")),
        "architecture": None if capability is None else "sm_{}{}".format(*capability),
        "native": native_dtypes(capability),
        "display": _display(nvml, card),
        "spills": is_wsl() or _is_wddm(nvml, card),
        "others": _other_programs(nvml, handle),
        "pcie": link,
        "link_bytes_per_s": chip_to_chip or (None if one_space else link_rate(link)),
        "peers": _peers(nvml, card),
        "memory_node": whole_number(ask(nvml, "nvmlDeviceGetNumaNodeId", card), most=4095),
        "one_space": one_space,
    }


def native_dtypes(capability: tuple[int, int] | None) -> tuple[str, ...]:
    """The torch dtypes that a card of this compute capability computes in; empty if it is unknown."""
    if capability is None:
        return ()
    return tuple(
        name
        for name, first in _NATIVE_FROM.items()
        if capability >= first and not (name == "float16" and capability == _WITHOUT_HALF)
    )


def pcie_link(nvml: Any, card: Any) -> Pcie | None:
    """The PCI Express link now, and the most that card and slot allow together; None if nothing is known."""

    def fact(question: str, most: int) -> int | None:
        return whole_number(ask(nvml, question, card), most=most) or None

    link = Pcie(
        generation=fact("nvmlDeviceGetCurrPcieLinkGeneration", 15),
        max_generation=fact("nvmlDeviceGetMaxPcieLinkGeneration", 15),
        width=fact("nvmlDeviceGetCurrPcieLinkWidth", 32),
        max_width=fact("nvmlDeviceGetMaxPcieLinkWidth", 32),
    )
    empty = Pcie(generation=None, max_generation=None, width=None, max_width=None)
    return None if link == empty else link


def chip_link_rate(nvml: Any, card: Any) -> float | None:
    """Bytes per second in one direction over NVLink-C2C, the link between Grace and its GPU; None elsewhere.

    The sum over active links, 44,712 MB/s on each of GH200's ten (nvml.h, NVML_FI_DEV_C2C_LINK_*).
    """
    (count,) = _fields(nvml, card, [(_C2C_COUNT, 0)]) or (None,)
    total = 0
    for link in range(whole_number(count, most=_MOST_LINKS) or 0):
        active, rate = _fields(nvml, card, [(_C2C_STATUS, link), (_C2C_RATE, link)]) or (None, None)
        total += (whole_number(rate, most=10**6) or 0) if active == 1 else 0
    return total * 1e6 or None


def _fields(nvml: Any, card: Any, wanted: list[tuple[int, int]]) -> list[int | None]:
    """The whole numbers of the fields, None for each the card lacks; empty if the card has no fields."""
    answers = ask(nvml, "nvmlDeviceGetFieldValues", card, wanted)
    try:
        return [None if answer.nvmlReturn else int(answer.value.uiVal) for answer in answers]
    except (TypeError, AttributeError, ValueError):
        return []


def _capability(nvml: Any, card: Any) -> tuple[int, int] | None:
    answer = ask(nvml, "nvmlDeviceGetCudaComputeCapability", card)
    try:
        major, minor = (whole_number(part, most=99) for part in answer)
    except (TypeError, ValueError):
        return None
    return None if major is None or minor is None else (major, minor)


def _vgpu(nvml: Any, card: Any) -> str | None:
    mode = ask(nvml, "nvmlDeviceGetVirtualizationMode", card)
    return "vGPU" if mode == getattr(nvml, "NVML_GPU_VIRTUALIZATION_MODE_VGPU", 2) else None


def _display(nvml: Any, card: Any) -> bool | None:
    answer = ask(nvml, "nvmlDeviceGetDisplayActive", card)
    return answer == 1 if isinstance(answer, int) else None


def _is_wddm(nvml: Any, card: Any) -> bool:
    """Whether Windows manages the memory (WDDM or MCDM). Older drivers have only the first version of the call."""
    for question in ("nvmlDeviceGetDriverModel", "nvmlDeviceGetDriverModel_v1"):
        answer = ask(nvml, question, card)
        if isinstance(answer, list | tuple) and answer:
            return answer[0] in (getattr(nvml, "NVML_DRIVER_WDDM", 0), getattr(nvml, "NVML_DRIVER_MCDM", 2))
    return False


def _other_programs(nvml: Any, handle: Any) -> tuple[Process, ...] | None:
    """Other programs on the card; None if the driver does not list programs.

    Their memory is missing if Windows manages it. In containers the process numbers are the host's, or none.
    """
    lists = [
        ask(nvml, question, handle)
        for question in (
            "nvmlDeviceGetComputeRunningProcesses",
            "nvmlDeviceGetGraphicsRunningProcesses",
            "nvmlDeviceGetMPSComputeRunningProcesses",  # clients of the multi-process service are in no other list
        )
    ]
    if all(entries is None for entries in lists):
        return None
    found: dict[int, Process] = {}
    for entry in (entry for entries in lists if isinstance(entries, list | tuple) for entry in entries):
        pid = whole_number(getattr(entry, "pid", None), most=1 << 32)
        used = whole_number(getattr(entry, "usedGpuMemory", None), most=1 << 50)
        if pid is not None and pid != os.getpid() and pid not in found:
            found[pid] = Process(pid=pid, name=_program(nvml, pid), used_bytes=used)
    return tuple(found[pid] for pid in sorted(found))


def _program(nvml: Any, pid: int) -> str | None:
    name = read_text(system_path(f"/proc/{pid}/comm")) or to_text(ask(nvml, "nvmlSystemGetProcessName", pid))
    return re.split(r"[/\\]", name)[-1] if name else None


def _peers(nvml: Any, card: Any) -> tuple[Peer, ...]:
    """The direct links to other cards, counted by the address of the other end."""
    ends: dict[str, int] = {}
    for end in _link_ends(nvml, card):
        ends[end] = ends.get(end, 0) + 1
    return tuple(Peer(link="NVLink", count=count, to=end) for end, count in sorted(ends.items()))


def _link_ends(nvml: Any, card: Any) -> Iterator[str]:
    for link in range(_MOST_LINKS):
        state = ask(nvml, "nvmlDeviceGetNvLinkState", card, link)
        if state is None:  # this card has no more
            return
        if state == 1:
            remote = ask(nvml, "nvmlDeviceGetNvLinkRemotePciInfo", card, link)
            yield to_text(getattr(remote, "busId", None)) or "unknown"
