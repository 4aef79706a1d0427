"""AMD cards and integrated GPUs, read from sysfs on Linux and through torch elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vramplan.hardware.pcie import link_rate, narrowest_link
from vramplan.hardware.process_usage import process_usage
from vramplan.hardware.sampling import low_median, samples
from vramplan.hardware.sysroot import (
    exists,
    list_folder,
    parse_number,
    read_bytes,
    read_number,
    read_table,
    read_text,
    resolve,
    system_path,
)
from vramplan.hardware.system import is_windows, is_wsl
from vramplan.hardware.torch_devices import ask_torch, torch_is_built_for
from vramplan.hardware.types import Accelerator, Host, Process, Reading
from vramplan.hardware.visible_devices import visible_positions
from vramplan.units import format_bytes

_VENDOR = "0x1002"
_KFD = "/dev/kfd"
_TOPOLOGY = "/sys/class/kfd/kfd/topology/nodes"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    """A GPU: its PCI directory, and its node in the compute driver, whose order is ROCm's.

    A data centre card may be partitioned: it then has a node for each of its `parts`.
    """

    path: Path
    node: Path | None
    order: tuple[int, str]
    parts: int = 1


def probe(host: Host) -> Iterator[Accelerator | str]:
    """Detect the AMD devices visible to this process, in ROCm's numbering; texts are notes on what cannot be read.

    Without access to the compute device `/dev/kfd` ROCm sees no card, so only a note is given.
    """
    cards = _cards()
    if cards and not torch_is_built_for("hip"):
        # Most processors have a GPU that is not used for computing. A torch built for ROCm counts it too.
        cards = [card for card in cards if not _is_integrated(card.path)]
    elif not cards:
        yield from _probe_torch(host)
        return
    if not os.access(system_path(_KFD), os.R_OK | os.W_OK):
        yield f"amd: {len(cards)} card(s), but {_KFD} may not be opened: install ROCm, join the group render"
        return
    cards = _filter_visible(cards)
    rounds = samples(lambda: [_read_used(card) for card in cards]) if cards else []
    for index, (card, used) in enumerate(zip(cards, zip(*rounds, strict=True), strict=True)):
        yield from _device(card, index, host, used)


def _cards() -> list[_Card]:
    """AMD's GPUs, in ROCm's order; `card0-DP-1` and the like are connectors, not cards.

    If the compute driver lists GPUs, others are left out: they are too old, or a container hides them from this
    process (kfd_devcgroup_check_permission in the kernel's amdkfd; the node cannot be read then).
    """
    links = (link / "device" for link in list_folder(system_path("/sys/class/drm"), "card*") if link.name[4:].isdigit())
    paths = {path for link in links if read_text(link / "vendor") == _VENDOR and (path := resolve(link)) is not None}
    nodes: dict[str, list[Path]] = {}
    for node in list_folder(system_path(_TOPOLOGY), "*"):
        if _properties(node).get("simd_count"):
            nodes.setdefault(_address(node), []).append(node)
    found: list[_Card] = []
    for path in paths:
        if read_number(path / "mem_info_vram_total") is None:
            continue
        if not nodes:
            found.append(_Card(path=path, node=None, order=(0, path.name)))
        own = nodes.get(path.name, [])
        found += (
            _Card(path=path, node=node, order=(parse_number(node.name) or 0, path.name), parts=len(own)) for node in own
        )
    return sorted(found, key=lambda card: card.order)


def _address(node: Path) -> str:
    """The PCI address of a node.

    location_id is bus << 8 | device << 3 | function, plus part << 28 on a partitioned card (kfd_topology.c).
    """
    facts = _properties(node)
    location = facts.get("location_id", 0)
    bus, device, function = location >> 8 & 0xFF, location >> 3 & 0x1F, location & 7
    return f"{facts.get('domain', 0):04x}:{bus:02x}:{device:02x}.{function}"


def _properties(node: Path) -> dict[str, int]:
    return read_table(node / "properties")


def _filter_visible(cards: list[_Card]) -> list[_Card]:
    """The cards left by ROCR_VISIBLE_DEVICES, then by HIP_VISIBLE_DEVICES or else CUDA_VISIBLE_DEVICES.

    https://rocm.docs.amd.com/en/latest/conceptual/gpu-isolation.html
    """
    inner = os.environ.get("HIP_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    for wanted in (os.environ.get("ROCR_VISIBLE_DEVICES"), inner):
        cards = [cards[position] for position in visible_positions(wanted, [_uuid(card) for card in cards])]
    return cards


def _read_used(card: _Card) -> dict[str, int | None]:
    return {pool: read_number(card.path / f"mem_info_{pool}_used") for pool in ("vram", "gtt")}


def _device(
    card: _Card, index: int, host: Host, used: Sequence[Mapping[str, int | None]]
) -> Iterator[Accelerator | str]:
    pool = _Pool(card, host)
    if not pool.total:
        yield f"amd: card {index} names no memory; it is left out"
        return
    if pool.doubt:
        yield f"amd: cuda:{index} is part of the processor: {pool.doubt}"
    own, own_readings = process_usage("cuda", index, pool.total)
    readings = (*pool.readings(used), *own_readings)
    free = min((reading.free_bytes for reading in readings), default=None)
    link = None if pool.built_in else narrowest_link(card.path)
    version = _architecture(card)
    yield Accelerator(
        kind="rocm",
        index=index,
        name=read_text(card.path / "product_name") or f"AMD GPU {read_text(card.path / 'device') or ''}".strip(),
        uuid=_uuid(card),
        part=None if card.parts == 1 else "partition",
        total_bytes=pool.total,
        free_bytes=free if free is None or own is None else min(pool.total, free + own.cached_bytes),
        unified=pool.shared,
        driver=read_text(system_path("/sys/module/amdgpu/version")),
        architecture=version,
        native=_native(version),
        free_readings=readings,
        free_reason=pool.reason if readings else None,
        others=_other_programs(card),
        own=own,
        pcie=link,
        link_bytes_per_s=link_rate(link),
    )


class _Pool:
    """The memory of a card that ROCm gives to programs, in bytes.

    A card has its own. On a partitioned card each part has a bank (amdgpu_amdkfd_xcp_memory_size), but usage is for the
    whole card: all of it may be in this part. An integrated GPU has the firmware's carve-out or, on kernels since 6.10,
    if the graphics table (GTT) can map more, the host's memory up to the GTT's size; the compute driver's topology
    says which. Releases differ, and some count both (ROCm/ROCm#6004, ROCm/hip#3892).
    """

    def __init__(self, card: _Card, host: Host) -> None:
        self.host = host
        self.built_in = _is_integrated(card.path)
        self.shared = False
        self.doubt: str | None = None
        self.total = own = read_number(card.path / "mem_info_vram_total") or 0
        self.reason = "the middle of three readings"
        mapped = read_number(card.path / "mem_info_gtt_total") or 0
        banked = sum(read_table(bank).get("size_in_bytes", 0) for bank in _banks(card))
        if card.parts > 1:
            self.total = min(banked or own // card.parts, own)
            self.reason = "what is in use on the whole card may all be in this part"
        if not self.built_in:
            return
        if banked > own:
            self.shared = True
            self.total = min(banked, host.total_bytes, mapped or banked)
            self.reason = "the memory is the host's: the least of both"
        elif not banked and mapped > own:
            self.doubt = (
                f"{format_bytes(own)} was carved out for it; newer systems give it up to {format_bytes(mapped)} of the "
                "host's memory, which is not known here"
            )

    def readings(self, rounds: Sequence[Mapping[str, int | None]]) -> tuple[Reading, ...]:
        """The free memory by each source."""
        kind = "gtt" if self.shared else "vram"
        used = low_median([reading[kind] for reading in rounds])
        found = () if used is None else (Reading(source=f"amdgpu {kind}", free_bytes=max(0, self.total - used)),)
        if not self.shared:
            return found
        return (
            *found,
            Reading(source="available on the host", free_bytes=min(self.host.available_bytes, self.total)),
        )


def _banks(card: _Card) -> list[Path]:
    return [] if card.node is None else list_folder(card.node / "mem_banks", "*/properties")


def _is_integrated(card: Path) -> bool:
    """Whether the GPU is part of a processor.

    Discrete cards report metrics in format 1, integrated GPUs in 2 or 3 (metrics_table_header in Linux'
    drivers/gpu/drm/amd/include/kgd_pp_interface.h). A GPU without metrics is assumed discrete.
    """
    header = read_bytes(card / "gpu_metrics")[:4]
    return len(header) == 4 and header[2] in (2, 3)


def _architecture(card: _Card) -> str | None:
    """The architecture in ROCm's form: `gfx1100` from gfx_target_version 110000; minor and step are hexadecimal."""
    version = _properties(card.node).get("gfx_target_version") if card.node is not None else None
    return None if not version else f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _native(architecture: str | None) -> tuple[str, ...]:
    """The torch dtypes that the architecture's matrix units compute in.

    https://rocm.docs.amd.com/en/latest/reference/precision-support.html: bfloat16 from MI100 and RDNA 3 on; float8
    in the fnuz form on MI300, in the OCP form on MI350 and RDNA 4.
    """
    if architecture is None:
        return ()
    known: tuple[str, ...] = ("float32", "float16")
    if architecture.startswith(("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")):
        known = (*known, "bfloat16")
    if architecture.startswith("gfx94"):
        return (*known, "float8_e4m3fnuz", "float8_e5m2fnuz")
    return (*known, "float8_e4m3fn", "float8_e5m2") if architecture.startswith(("gfx95", "gfx12")) else known


def _other_programs(card: _Card) -> tuple[Process, ...] | None:
    """Other programs with memory on the card, by the compute driver; None if it does not list programs."""
    gpu = read_text(card.node / "gpu_id") if card.node is not None else None
    if not gpu or not exists(system_path("/sys/class/kfd/kfd/proc")):
        return None
    used = {
        int(folder.name): read_number(folder / f"vram_{gpu}")
        for folder in list_folder(system_path("/sys/class/kfd/kfd/proc"), "*")
        if parse_number(folder.name) not in (None, os.getpid())
    }
    return tuple(
        Process(pid=pid, name=read_text(system_path(f"/proc/{pid}/comm")), used_bytes=size)
        for pid, size in sorted(used.items())
        if size
    )


def _uuid(card: _Card) -> str | None:
    """The identifier of the card, or of its part on a partitioned card, which the compute driver gives as a number."""
    unique = read_text(card.path / "unique_id")
    if card.parts > 1 and card.node is not None:
        own = _properties(card.node).get("unique_id")
        unique = None if own is None else f"{own:016x}"
    return f"GPU-{unique}" if unique else None


def _probe_torch(host: Host) -> Iterator[Accelerator | str]:
    """Detect the devices through torch on Windows and WSL2, which have no sysfs entries for them."""
    if not (is_windows() or is_wsl()) or not torch_is_built_for("hip"):
        return
    answers = ask_torch("cuda")
    if isinstance(answers, str):
        yield f"amd: {answers}"
        return
    for index, answer in enumerate(answers):
        yield from _torch_device(answer, index, host)


def _torch_device(answer: dict[str, Any], index: int, host: Host) -> Iterator[Accelerator | str]:
    """A device by torch. On Windows its free memory ignores other programs; in WSL2 it is right (ROCm/librocdxg#57)."""
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
