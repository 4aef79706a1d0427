"""Discrete AMD cards on Linux, read from sysfs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vramplan.hardware.types import Accelerator, Host
from vramplan.hardware.visible import visible_positions

_DRM = Path("/sys/class/drm")
_KFD = Path("/dev/kfd")


def probe(_host: Host, *, drm: Path = _DRM, kfd: Path = _KFD) -> Iterator[Accelerator | str]:
    """The AMD cards this process will see, in PCI bus order, as ROCm numbers them.

    Without the compute device `/dev/kfd` ROCm sees no card, so nothing is reported.
    """
    cards = [card for card in _devices(drm) if _is_discrete(card)]
    if cards and not os.access(kfd, os.R_OK | os.W_OK):
        yield f"amd: {len(cards)} card(s), but {kfd} may not be opened: install ROCm, join the group render"
        return
    for index, card in enumerate(_visible(cards)):
        yield _card(card, index)


def _devices(drm: Path) -> list[Path]:
    """The PCI directories of AMD's GPUs; `card0-DP-1` and the like are connectors, not cards."""
    links = (link / "device" for link in drm.glob("card*") if link.name[4:].isdigit())
    ours = (link.resolve() for link in links if _read(link / "vendor") == "0x1002")
    return sorted(ours, key=lambda path: path.name)  # the name is the PCI address


def _is_discrete(card: Path) -> bool:
    """Whether the card has memory of its own.

    Discrete cards report metrics in format 1, processors with a built-in GPU in 2 or 3 (metrics_table_header
    in Linux' drivers/gpu/drm/amd/include/kgd_pp_interface.h). One without metrics is taken to be discrete.
    """
    if _number(card / "mem_info_vram_total") is None:
        return False
    try:
        header = (card / "gpu_metrics").read_bytes()[:4]
    except OSError:
        return True
    return len(header) < 4 or header[2] == 1


def _visible(cards: list[Path]) -> list[Path]:
    """ROCm filters twice: ROCR_VISIBLE_DEVICES, then HIP_VISIBLE_DEVICES or CUDA's within what is left.

    https://rocm.docs.amd.com/en/latest/conceptual/gpu-isolation.html
    """
    inner = os.environ.get("HIP_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    for wanted in (os.environ.get("ROCR_VISIBLE_DEVICES"), inner):
        cards = [cards[position] for position in visible_positions(wanted, [_uuid(card) for card in cards])]
    return cards


def _card(card: Path, index: int) -> Accelerator:
    total = _number(card / "mem_info_vram_total") or 0
    used = _number(card / "mem_info_vram_used")
    return Accelerator(
        kind="rocm",
        index=index,
        name=_read(card / "product_name") or f"AMD GPU {_read(card / 'device') or ''}".strip(),
        uuid=_uuid(card),
        total_bytes=total,
        free_bytes=None if used is None else max(0, total - used),
    )


def _uuid(card: Path) -> str | None:
    unique = _read(card / "unique_id")
    return f"GPU-{unique}" if unique else None


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text and text.isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
