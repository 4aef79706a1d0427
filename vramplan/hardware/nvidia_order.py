"""Map CUDA's device numbers to cards by identity, never by index.

NVML and nvidia-smi count in PCI order, CUDA by default the fastest first, with the order of the rest unspecified
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

from vramplan.hardware.process_usage import process_uuids
from vramplan.hardware.visible_devices import uses_identifiers, visible_positions

# Run in a separate process, so that this one gets no driver state and can still fork. It makes no context either:
# cuInit and the UUIDs need none. `_v2` identifies MIG instances, the older call their card.
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
_TIMEOUT_SECONDS = 20  # the driver of many cards without persistence mode takes this long to start


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A card, or a MIG instance that CUDA shows as a device.

    `card` is the UUID of an instance's card, `old_name` an instance's name before driver 470.
    """

    uuid: str | None
    is_part: bool = False
    card: str | None = None
    old_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """For each CUDA number the positions of its candidate units: exactly one if it is identified."""

    candidates: list[tuple[int, ...]]
    notes: list[str] = field(default_factory=list)


def cuda_order(units: Sequence[Unit]) -> Order:
    """Map `cuda:0`, `cuda:1` and so on in this process to positions in `units` (NVML's, in PCI order)."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    mine = process_uuids("cuda")
    if mine is not None:
        return _order_from_uuids(mine, units)
    if text is not None and uses_identifiers(text):
        order = _order_from_names(text, units)
        return order if _is_certain(order, text, units) else _order_from_cuda(order, units)
    if not units or text == "" or _numbers_are_positions(units):
        return Order(candidates=[(position,) for position in visible_positions(text, [unit.uuid for unit in units])])
    answered = ask_cuda()
    return _order_from_uuids(answered, units) if answered is not None else _unidentified_order(text, units)


def ask_cuda() -> list[str] | None:
    """Ask CUDA for its devices' UUIDs, in its order, as 32 hexadecimal digits; None if it does not answer."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _QUESTION],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        return [str(uuid) for uuid in json.loads(done.stdout)]
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        return None


def _order_from_cuda(read: Order, units: Sequence[Unit]) -> Order:
    """The order by CUDA's own answer; `read`, the order by the variable, if CUDA does not answer."""
    answered = ask_cuda() if units else None
    return read if answered is None else _order_from_uuids(answered, units)


def _is_certain(order: Order, text: str, units: Sequence[Unit]) -> bool:
    """Whether each name in the list identifies one device, and MIG hides no second one."""
    named = [position for candidates in order.candidates for position in candidates]
    parts = any(units[position].is_part for position in named)
    return len(named) == text.count(",") + 1 == len(order.candidates) and (len(named) == 1 or not parts)


def _numbers_are_positions(units: Sequence[Unit]) -> bool:
    """Whether numbers are positions: whole cards, and either one card or an order fixed by the user."""
    pinned = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    return not any(unit.is_part for unit in units) and (len(units) == 1 or pinned)


def _order_from_names(text: str, units: Sequence[Unit]) -> Order:
    """The order by the names in CUDA_VISIBLE_DEVICES; if one is a MIG instance, only the first is visible."""
    old = text.startswith("MIG-GPU-")
    names = [unit.old_name if old and unit.old_name else unit.uuid for unit in units]
    positions = visible_positions(text, names)
    if not positions:
        return _order_from_card_name(text.partition(",")[0], units)
    if len(positions) > 1 and any(units[position].is_part for position in positions):
        note = "nvidia: CUDA shows one MIG instance to a process: the first that CUDA_VISIBLE_DEVICES names"
        return Order(candidates=[(positions[0],)], notes=[note])
    return Order(candidates=[(position,) for position in positions])


def _order_from_card_name(name: str, units: Sequence[Unit]) -> Order:
    """The order if the name is a split card's: any of its instances; empty if it is not exactly one split card's."""
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


def _order_from_uuids(uuids: Sequence[str], units: Sequence[Unit]) -> Order:
    order = Order(candidates=[_matching_units(_digits(uuid), units) for uuid in uuids])
    for index, candidates in enumerate(order.candidates):
        if len(candidates) == 1:
            continue
        parts = len(candidates) < len(units)
        which = "one of the MIG instances of its card" if parts else "none of the devices that the driver names"
        order.notes.append(f"nvidia: cuda:{index} is {which}: unidentified")
    return order


def _matching_units(uuid: str, units: Sequence[Unit]) -> tuple[int, ...]:
    """The unit with the UUID, else the instances of the card with it (older CUDA gives the card's), else all units."""
    exact = tuple(place for place, unit in enumerate(units) if _digits(unit.uuid) == uuid)
    parts = tuple(place for place, unit in enumerate(units) if unit.is_part and _digits(unit.card) == uuid)
    return exact[:1] or parts or tuple(range(len(units)))


def _unidentified_order(text: str | None, units: Sequence[Unit]) -> Order:
    """The order if CUDA does not answer: as many numbers as visible devices, each with all units as candidates."""
    parts = [position for position, unit in enumerate(units) if unit.is_part]
    # If an instance is visible, whole cards and other instances are not: with one instance there is no doubt.
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


def _digits(uuid: str | None) -> str:
    """The UUID's digits: torch and CUDA omit the prefix, CUDA the dashes too."""
    return (uuid or "").removeprefix("GPU-").removeprefix("MIG-").replace("-", "").lower()
