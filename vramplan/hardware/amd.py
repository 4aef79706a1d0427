"""AMD cards and processors with a GPU on Linux, read from sysfs; elsewhere through torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vramplan.hardware.own import own_use
from vramplan.hardware.pcie import link_rate, narrowest_link
from vramplan.hardware.sampling import middle, spaced
from vramplan.hardware.sysroot import as_number, at, entries, exists, number, read, read_bytes, read_table, resolved
from vramplan.hardware.system import is_windows, is_wsl
from vramplan.hardware.torch_answers import ask_torch, torch_is_built_for
from vramplan.hardware.types import Accelerator, Host, Process, Reading
from vramplan.hardware.visible import visible_positions
from vramplan.units import format_bytes

_VENDOR = "0x1002"
_KFD = "/dev/kfd"
_TOPOLOGY = "/sys/class/kfd/kfd/topology/nodes"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    """A GPU: its PCI directory, and its node of the compute driver, whose order is ROCm's.

    A data centre card may be split: then it has a node for each of its `parts`.
    """

    path: Path
    node: Path | None
    order: tuple[int, str]
    parts: int = 1


def probe(host: Host) -> Iterator[Accelerator | str]:
    """The AMD devices this process will see, as ROCm numbers them, and notes on what could not be read.

    Without the compute device `/dev/kfd` ROCm sees no card, so nothing is reported.
    """
    cards = _cards()
    if cards and not torch_is_built_for("hip"):
        # Most processors have a GPU that nobody means to compute on. A torch that could would count it too.
        cards = [card for card in cards if not _is_built_in(card.path)]
    elif not cards:
        yield from _through_torch(host)
        return
    if not os.access(at(_KFD), os.R_OK | os.W_OK):
        yield f"amd: {len(cards)} card(s), but {_KFD} may not be opened: install ROCm, join the group render"
        return
    cards = _visible(cards)
    rounds = spaced(lambda: [_used(card) for card in cards]) if cards else []
    for index, (card, used) in enumerate(zip(cards, zip(*rounds, strict=True), strict=True)):
        yield from _device(card, index, host, used)


def _cards() -> list[_Card]:
    """AMD's GPUs; `card0-DP-1` and the like are connectors, not cards.

    Where the compute driver names GPUs, one that is not among them is none to compute on: it is too old, or a
    container keeps it from this process (kfd_devcgroup_check_permission in the kernel's amdkfd; its node cannot be
    read then).
    """
    links = (link / "device" for link in entries(at("/sys/class/drm"), "card*") if link.name[4:].isdigit())
    paths = {path for link in links if read(link / "vendor") == _VENDOR and (path := resolved(link)) is not None}
    nodes: dict[str, list[Path]] = {}
    for node in entries(at(_TOPOLOGY), "*"):
        if _properties(node).get("simd_count"):
            nodes.setdefault(_address(node), []).append(node)
    found: list[_Card] = []
    for path in paths:
        if number(path / "mem_info_vram_total") is None:
            continue
        if not nodes:
            found.append(_Card(path=path, node=None, order=(0, path.name)))
        own = nodes.get(path.name, [])
        found += (
            _Card(path=path, node=node, order=(as_number(node.name) or 0, path.name), parts=len(own)) for node in own
        )
    return sorted(found, key=lambda card: card.order)


def _address(node: Path) -> str:
    """The PCI address of a node.

    location_id is bus << 8 | device << 3 | function, and of a card that is split the part << 28 (kfd_topology.c).
    """
    facts = _properties(node)
    location = facts.get("location_id", 0)
    bus, device, function = location >> 8 & 0xFF, location >> 3 & 0x1F, location & 7
    return f"{facts.get('domain', 0):04x}:{bus:02x}:{device:02x}.{function}"


def _properties(node: Path) -> dict[str, int]:
    return read_table(node / "properties")


def _visible(cards: list[_Card]) -> list[_Card]:
    """ROCm filters twice: ROCR_VISIBLE_DEVICES, then HIP_VISIBLE_DEVICES or CUDA's within what is left.

    https://rocm.docs.amd.com/en/latest/conceptual/gpu-isolation.html
    """
    inner = os.environ.get("HIP_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    for wanted in (os.environ.get("ROCR_VISIBLE_DEVICES"), inner):
        cards = [cards[position] for position in visible_positions(wanted, [_uuid(card) for card in cards])]
    return cards


def _used(card: _Card) -> dict[str, int | None]:
    return {pool: number(card.path / f"mem_info_{pool}_used") for pool in ("vram", "gtt")}


def _device(
    card: _Card, index: int, host: Host, used: Sequence[Mapping[str, int | None]]
) -> Iterator[Accelerator | str]:
    pool = _Pool(card, host)
    if not pool.total:
        yield f"amd: card {index} names no memory; it is left out"
        return
    if pool.doubt:
        yield f"amd: cuda:{index} is part of the processor: {pool.doubt}"
    own, own_readings = own_use("cuda", index, pool.total)
    readings = (*pool.readings(used), *own_readings)
    free = min((reading.free_bytes for reading in readings), default=None)
    link = None if pool.built_in else narrowest_link(card.path)
    version = _architecture(card)
    yield Accelerator(
        kind="rocm",
        index=index,
        name=read(card.path / "product_name") or f"AMD GPU {read(card.path / 'device') or ''}".strip(),
        uuid=_uuid(card),
        part=None if card.parts == 1 else "partition",
        total_bytes=pool.total,
        free_bytes=free if free is None or own is None else min(pool.total, free + own.cached_bytes),
        unified=pool.shared,
        driver=read(at("/sys/module/amdgpu/version")),
        architecture=version,
        native=_native(version),
        free_readings=readings,
        free_reason=pool.reason if readings else None,
        others=_others(card),
        own=own,
        pcie=link,
        link_bytes_per_s=link_rate(link),
    )


class _Pool:
    """The memory ROCm gives programs of a card. Bytes.

    A card has its own. Of one that is split each part has a bank (amdgpu_amdkfd_xcp_memory_size), while what is in use
    is told of all of them together: all of it may be in this one. A processor's GPU has what the firmware carved out
    for it, or, on kernels since 6.10 where that is less than the graphics table may map (GTT), the host's memory up to
    there: which of both, the compute driver's own topology says. Releases differ, and some count both
    (ROCm/ROCm#6004, ROCm/hip#3892).
    """

    def __init__(self, card: _Card, host: Host) -> None:
        self.host = host
        self.built_in = _is_built_in(card.path)
        self.shared = False
        self.doubt: str | None = None
        self.total = own = number(card.path / "mem_info_vram_total") or 0
        self.reason = "the middle of three readings"
        mapped = number(card.path / "mem_info_gtt_total") or 0
        told = sum(read_table(bank).get("size_in_bytes", 0) for bank in _banks(card))
        if card.parts > 1:
            self.total = min(told or own // card.parts, own)
            self.reason = "what is in use on the whole card may all be in this part"
        if not self.built_in:
            return
        if told > own:
            self.shared = True
            self.total = min(told, host.total_bytes, mapped or told)
            self.reason = "the memory is the host's: the least of both"
        elif not told and mapped > own:
            self.doubt = (
                f"{format_bytes(own)} was carved out for it; newer systems give it up to {format_bytes(mapped)} of the "
                "host's memory, which is not known here"
            )

    def readings(self, rounds: Sequence[Mapping[str, int | None]]) -> tuple[Reading, ...]:
        """What is free, by each source."""
        kind = "gtt" if self.shared else "vram"
        used = middle([reading[kind] for reading in rounds])
        found = () if used is None else (Reading(source=f"amdgpu {kind}", free_bytes=max(0, self.total - used)),)
        if not self.shared:
            return found
        return (
            *found,
            Reading(source="available on the host", free_bytes=min(self.host.available_bytes, self.total)),
        )


def _banks(card: _Card) -> list[Path]:
    return [] if card.node is None else entries(card.node / "mem_banks", "*/properties")


def _is_built_in(card: Path) -> bool:
    """Whether it is part of a processor.

    Discrete cards report metrics in format 1, processors with a built-in GPU in 2 or 3 (metrics_table_header
    in Linux' drivers/gpu/drm/amd/include/kgd_pp_interface.h). One without metrics is taken to be discrete.
    """
    header = read_bytes(card / "gpu_metrics")[:4]
    return len(header) == 4 and header[2] in (2, 3)


def _architecture(card: _Card) -> str | None:
    """`gfx1100` from gfx_target_version 110000, as ROCm spells it: the minor number and the step in hexadecimal."""
    version = _properties(card.node).get("gfx_target_version") if card.node is not None else None
    return None if not version else f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _native(architecture: str | None) -> tuple[str, ...]:
    """The torch dtypes its matrix units compute in.

    https://rocm.docs.amd.com/en/latest/reference/precision-support.html: bfloat16 from MI100 and RDNA 3 on; float8
    in the NaN-only form on MI300, in the usual one on MI350 and RDNA 4.
    """
    if architecture is None:
        return ()
    known: tuple[str, ...] = ("float32", "float16")
    if architecture.startswith(("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")):
        known = (*known, "bfloat16")
    if architecture.startswith("gfx94"):
        return (*known, "float8_e4m3fnuz", "float8_e5m2fnuz")
    return (*known, "float8_e4m3fn", "float8_e5m2") if architecture.startswith(("gfx95", "gfx12")) else known


def _others(card: _Card) -> tuple[Process, ...] | None:
    """Programs with memory on the card by the compute driver's own books; None where it shows none."""
    gpu = read(card.node / "gpu_id") if card.node is not None else None
    if not gpu or not exists(at("/sys/class/kfd/kfd/proc")):
        return None
    used = {
        int(folder.name): number(folder / f"vram_{gpu}")
        for folder in entries(at("/sys/class/kfd/kfd/proc"), "*")
        if as_number(folder.name) not in (None, os.getpid())
    }
    return tuple(
        Process(pid=pid, name=read(at(f"/proc/{pid}/comm")), used_bytes=size)
        for pid, size in sorted(used.items())
        if size
    )


def _uuid(card: _Card) -> str | None:
    """Of a card that is split each part has its own, which the compute driver knows as a number."""
    unique = read(card.path / "unique_id")
    if card.parts > 1 and card.node is not None:
        own = _properties(card.node).get("unique_id")
        unique = None if own is None else f"{own:016x}"
    return f"GPU-{unique}" if unique else None


def _through_torch(host: Host) -> Iterator[Accelerator | str]:
    """Where there is no sysfs to read: Windows, and Linux inside it."""
    if not (is_windows() or is_wsl()) or not torch_is_built_for("hip"):
        return
    answers = ask_torch("cuda")
    if isinstance(answers, str):
        yield f"amd: {answers}"
        return
    for index, answer in enumerate(answers):
        yield from _by_torch(answer, index, host)


def _by_torch(answer: dict[str, Any], index: int, host: Host) -> Iterator[Accelerator | str]:
    """Its free memory leaves out what other programs use on Windows; inside WSL2 it is right (ROCm/librocdxg#57)."""
    architecture = (answer.get("architecture") or "").partition(":")[0] or None
    unified, free = bool(answer.get("integrated")), answer["free_bytes"]
    total = min(answer["total_bytes"], host.total_bytes) if unified else answer["total_bytes"]
    if is_windows():
        yield (
            f"amd: what is free on cuda:{index} leaves out what other programs use, which Windows does not say: "
            "keep more free with `margin`"
        )
    if free is not None and unified:
        free = min(free, host.available_bytes)
    readings = () if free is None else (Reading(source="torch, in a process of its own", free_bytes=min(free, total)),)
    yield Accelerator(
        kind="rocm",
        index=index,
        name=answer["name"],
        uuid=f"GPU-{answer['uuid']}" if answer.get("uuid") else None,
        total_bytes=total,
        free_bytes=readings[0].free_bytes if readings else None,
        unified=unified,
        architecture=architecture,
        native=_native(architecture),
        spills=True,
        free_readings=readings,
        free_reason="the only source" if readings else None,
    )
