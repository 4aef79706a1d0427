"""Intel GPUs, discrete and integrated: listed in sysfs, read through torch, the only source of their memory size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vramplan.hardware.pcie import link_rate, narrowest_link
from vramplan.hardware.process_usage import process_usage
from vramplan.hardware.sysroot import list_folder, read_text, resolve, system_path
from vramplan.hardware.system import is_windows, is_wsl
from vramplan.hardware.torch_devices import ask_torch, torch_is_built_for
from vramplan.hardware.types import Accelerator, Host, Pcie, Reading

_VENDOR = "0x8086"
_COMPUTE_DRIVERS = ("i915", "xe")


def probe(host: Host) -> Iterator[Accelerator | str]:
    """Detect the devices torch calls `xpu`; nothing if there are none, or if the installed torch cannot use them.

    The kernel does not report their memory, and Intel's own library needs its whole run-time: so torch is asked, in a
    separate process, and only if it is built for them.
    """
    cards = _cards()
    if not cards and not is_windows() and not is_wsl():
        return
    if not torch_is_built_for("xpu"):
        if any(_is_discrete(card) for card in cards):
            yield (
                "intel: a graphics card is here, but the installed torch cannot use it: "
                "pip install torch --index-url https://download.pytorch.org/whl/xpu"
            )
        return
    answers = ask_torch("xpu")
    if isinstance(answers, str):
        yield f"intel: {answers}"
        return
    if cards and not answers:
        yield "intel: a GPU is here, but torch finds none: install the compute run-time, join the group render"
    for index, answer in enumerate(answers):
        yield _device(answer, index, host, cards)


def _cards() -> list[Path]:
    """The PCI directories of Intel's GPUs, in bus order."""
    links = (link / "device" for link in list_folder(system_path("/sys/class/drm"), "card*") if link.name[4:].isdigit())
    found = {path for link in links if read_text(link / "vendor") == _VENDOR and (path := resolve(link)) is not None}
    return sorted((card for card in found if _driver(card) in _COMPUTE_DRIVERS), key=lambda card: card.name)


def _driver(card: Path) -> str:
    driver = resolve(card / "driver")
    return "" if driver is None else driver.name


def _is_discrete(card: Path) -> bool:
    """Whether the GPU is discrete: integrated ones are at 0000:00:02.0 (Intel's datasheets, "processor graphics")."""
    return card.name != "0000:00:02.0"


def _device(answer: dict[str, Any], index: int, host: Host, cards: list[Path]) -> Accelerator:
    unified = bool(answer.get("integrated"))
    total = min(answer["total_bytes"], host.total_bytes) if unified else answer["total_bytes"]
    own, readings = process_usage("xpu", index, total)
    free, why = answer["free_bytes"], "what torch says"
    if free is not None:
        readings = (Reading(source="torch, in a process of its own", free_bytes=max(0, min(free, total))), *readings)
    if unified:
        readings = (*readings, Reading(source="available on the host", free_bytes=min(host.available_bytes, total)))
        why = "the memory is the host's: the least of all sources"
    link = _link(cards, unified)
    return Accelerator(
        kind="xpu",
        index=index,
        name=answer["name"],
        uuid=answer.get("uuid"),
        total_bytes=total,
        free_bytes=min((reading.free_bytes for reading in readings), default=None),
        unified=unified,
        driver=answer.get("driver"),
        architecture=answer.get("architecture"),
        native=tuple(answer["native"]),
        spills=is_windows() and not unified,
        free_readings=readings,
        free_reason=why if readings else None,
        own=own,
        pcie=link,
        link_bytes_per_s=link_rate(link),
    )


def _link(cards: list[Path], unified: bool) -> Pcie | None:
    """The link if there is exactly one discrete card, so that the device is certain; else None."""
    discrete = [card for card in cards if _is_discrete(card)]
    return narrowest_link(discrete[0]) if len(discrete) == 1 and not unified else None
