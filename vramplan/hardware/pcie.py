"""PCI Express links: the rate of a lane, and the slowest link between a device and its root port."""

from __future__ import annotations

from pathlib import Path

from vramplan.hardware.sysroot import parse_number, read_text
from vramplan.hardware.types import Pcie

# Bytes per second in one direction on one lane, after line coding, by PCIe generation (PCI-SIG base specifications:
# 8b/10b for 1 and 2, 128b/130b for 3 to 5, 242 of 256 bytes of a flit for 6).
LANE_BYTES_PER_S = {
    1: 2.5e9 * 8 / 10 / 8,
    2: 5e9 * 8 / 10 / 8,
    3: 8e9 * 128 / 130 / 8,
    4: 16e9 * 128 / 130 / 8,
    5: 32e9 * 128 / 130 / 8,
    6: 64e9 * 242 / 256 / 8,
}
# Linux writes the speed: "16.0 GT/s PCIe" (drivers/pci/probe.c, pci_speed_string).
_GENERATIONS = {"2.5": 1, "5.0": 2, "5": 2, "8.0": 3, "8": 3, "16.0": 4, "16": 4, "32.0": 5, "32": 5, "64.0": 6}


def link_rate(link: Pcie | None) -> float | None:
    """Peak bytes per second in one direction; None if unknown.

    The generation falls while a card idles, so the highest that card and slot allow is taken
    (NVIDIA/open-gpu-kernel-modules#731). The width does not fall, and the current one reveals an x4 slot.
    """
    if link is None:
        return None
    lane = LANE_BYTES_PER_S.get(link.max_generation or 0)
    width = link.width or link.max_width
    return lane * width if lane and width else None


def narrowest_link(device: Path) -> Pcie | None:
    """The slowest link between a PCI device and its root port; None if none can be read.

    Switches, on some cards soldered next to the chip, make the chip's own link look faster than the slot's
    (Syllo/nvtop#242, nokyan/resources#512).
    """
    links = [link for link in map(_link, (device, *device.parents)) if link is not None]
    return min(links, key=lambda link: link_rate(link) or float("inf"), default=None)


def _link(device: Path) -> Pcie | None:
    link = Pcie(
        generation=_generation(device / "current_link_speed"),
        max_generation=_generation(device / "max_link_speed"),
        width=_width(device / "current_link_width"),
        max_width=_width(device / "max_link_width"),
    )
    return link if link.max_generation and link.width else None


def _generation(path: Path) -> int | None:
    words = (read_text(path) or "").split()
    return _GENERATIONS.get(words[0]) if words else None


def _width(path: Path) -> int | None:
    """The number of lanes; None for 0 and 255, which the kernel writes if a link is down or unknown."""
    width = parse_number(read_text(path))
    return width if width is not None and 1 <= width <= 32 else None
