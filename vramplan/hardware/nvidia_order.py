"""Which card each number of CUDA means: by identity, never by index.

NVML and nvidia-smi count in PCI order, CUDA by default the fastest first, and it leaves the order of the rest open
(CUDA C++ Programming Guide, environment variables). Of cards split by MIG it shows one instance only
(MIG User Guide, "CUDA visible devices"). So where numbers decide, CUDA itself is asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from vramplan.hardware.own import own_identities
from vramplan.hardware.visible import names_devices, visible_positions

# Asked in a process of its own: this one gets no driver state, so that it may still fork. No context is made there
# either: cuInit and the identity of devices need none. `_v2` names MIG instances, the older call their card.
_QUESTION = """
import ctypes, json, sys
cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
count, device, found = ctypes.c_int(), ctypes.c_int(), []
if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
    sys.exit("no answer")
for index in range(count.value):
    if cuda.cuDeviceGet(ctypes.byref(device), index):
        sys.exit("no answer")
    uuid = ctypes.create_string_buffer(16)
    ask = getattr(cuda, "cuDeviceGetUuid_v2", None) or cuda.cuDeviceGetUuid
    if ask(uuid, device):
        sys.exit("no answer")
    found.append(uuid.raw.hex())
print(json.dumps(found))
"""
_PATIENCE_SECONDS = 20  # starting the driver of many cards without persistence mode takes so long


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A card, or a part of one that CUDA shows as a device.

    `card` is the identity of the card that a part is of, `old_name` a part's name before driver 470.
    """

    uuid: str | None
    is_part: bool = False
    card: str | None = None
    old_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """For each number of CUDA the positions of the units it may mean: one where it is identified."""

    candidates: list[tuple[int, ...]]
    notes: list[str] = field(default_factory=list)


def cuda_order(units: Sequence[Unit]) -> Order:
    """What `cuda:0`, `cuda:1` and so on mean in this process, as positions in `units` (NVML's, in PCI order)."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    mine = own_identities("cuda")
    if mine is not None:
        return _by_identity(mine, units)
    if text is not None and names_devices(text):
        order = _named(text, units)
        return order if _is_sure(order, text, units) else _as_cuda_says(order, units)
    if not units or text == "" or _order_is_plain(units):
        return Order(candidates=[(position,) for position in visible_positions(text, [unit.uuid for unit in units])])
    answered = ask_cuda()
    return _by_identity(answered, units) if answered is not None else _unidentified(text, units)


def ask_cuda() -> list[str] | None:
    """The UUIDs of the devices CUDA shows, in its order, as 32 hexadecimal digits; None where it does not answer."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _QUESTION],
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        return [str(uuid) for uuid in json.loads(done.stdout)]
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        return None


def _as_cuda_says(read: Order, units: Sequence[Unit]) -> Order:
    """CUDA's own answer where the variable leaves doubt; what was read from the variable where there is none."""
    answered = ask_cuda() if units else None
    return read if answered is None else _by_identity(answered, units)


def _is_sure(order: Order, text: str, units: Sequence[Unit]) -> bool:
    """Whether every name in the list is that of one device, and no second device may be hidden by MIG."""
    named = [position for candidates in order.candidates for position in candidates]
    parts = any(units[position].is_part for position in named)
    return len(named) == text.count(",") + 1 == len(order.candidates) and (len(named) == 1 or not parts)


def _order_is_plain(units: Sequence[Unit]) -> bool:
    """Whether numbers mean positions: whole cards, and one only or in an order that the user pinned."""
    pinned = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    return not any(unit.is_part for unit in units) and (len(units) == 1 or pinned)


def _named(text: str, units: Sequence[Unit]) -> Order:
    """The devices that CUDA_VISIBLE_DEVICES names; of the parts of cards only the first is shown."""
    old = text.startswith("MIG-GPU-")
    names = [unit.old_name if old and unit.old_name else unit.uuid for unit in units]
    positions = visible_positions(text, names)
    if not positions:
        return _named_by_card(text.partition(",")[0], units)
    if len(positions) > 1 and any(units[position].is_part for position in positions):
        note = "nvidia: CUDA shows one MIG instance to a process: the first that CUDA_VISIBLE_DEVICES names"
        return Order(candidates=[(positions[0],)], notes=[note])
    return Order(candidates=[(position,) for position in positions])


def _named_by_card(name: str, units: Sequence[Unit]) -> Order:
    """The parts of the card of that name, of which CUDA takes one; nothing where no one card with parts is meant."""
    parts = tuple(place for place, unit in enumerate(units) if unit.is_part and (unit.card or "").startswith(name))
    if len({units[place].card for place in parts}) != 1:
        note = (
            "nvidia: CUDA_VISIBLE_DEVICES names no device that is here, or not clearly: "
            "`nvidia-smi -L` lists their names"
        )
        return Order(candidates=[], notes=[note])
    if len(parts) == 1:
        return Order(candidates=[parts])
    why = f"which of its {len(parts)} MIG instances CUDA takes is not known, it did not answer"
    advice = "name one with CUDA_VISIBLE_DEVICES=MIG-... (`nvidia-smi -L` lists them)"
    return Order(
        candidates=[parts], notes=[f"nvidia: CUDA_VISIBLE_DEVICES names a card that is split: {why}: {advice}"]
    )


def _by_identity(uuids: Sequence[str], units: Sequence[Unit]) -> Order:
    order = Order(candidates=[_meant(_bare(uuid), units) for uuid in uuids])
    for index, candidates in enumerate(order.candidates):
        if len(candidates) == 1:
            continue
        parts = len(candidates) < len(units)
        which = "one of the MIG instances of its card" if parts else "none of the devices that the driver names"
        order.notes.append(f"nvidia: cuda:{index} is {which}: unidentified")
    return order


def _meant(uuid: str, units: Sequence[Unit]) -> tuple[int, ...]:
    """The device of that identity, or the parts of that card (older CUDA calls a part by its card); else any."""
    exact = tuple(place for place, unit in enumerate(units) if _bare(unit.uuid) == uuid)
    parts = tuple(place for place, unit in enumerate(units) if unit.is_part and _bare(unit.card) == uuid)
    return exact[:1] or parts or tuple(range(len(units)))


def _unidentified(text: str | None, units: Sequence[Unit]) -> Order:
    """So many devices are visible, and each number may mean any of them."""
    parts = [position for position, unit in enumerate(units) if unit.is_part]
    # Where a part is shown, whole cards are not, and no second part is: with one part there is no doubt.
    among = parts or range(len(units))
    visible = visible_positions(text, [units[position].uuid for position in among])
    count = min(1, len(visible)) if parts else len(visible)
    if len(parts) == 1 or not count:
        return Order(candidates=[tuple(parts)] * count)
    if parts:
        advice = "name one with CUDA_VISIBLE_DEVICES=MIG-... (`nvidia-smi -L` lists them)"
        why = f"which of the {len(parts)} MIG instances"
    else:
        advice = "set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        why = f"which of the {len(units)} cards, as CUDA puts the fastest first,"
    note = f"nvidia: {why} each number means is not known, CUDA itself did not answer: {advice}"
    return Order(candidates=[tuple(among)] * count, notes=[note])


def _bare(uuid: str | None) -> str:
    """The digits alone: torch and CUDA leave out the prefix, CUDA the dashes too."""
    return (uuid or "").removeprefix("GPU-").removeprefix("MIG-").replace("-", "").lower()
