"""From what a machine has to what a plan may use of it. Pure: the same hardware gives the same budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from vramplan.errors import NothingFitsError, UsageError
from vramplan.hardware.host import DISK_LEFT_FREE
from vramplan.hardware.types import Accelerator, Budget, Deduction, Hardware, Host
from vramplan.planner.residuals import ProjectionError
from vramplan.units import GIB, MIB, format_bytes, parse_amount, parse_bytes

# What a driver takes for its own context and the kernels it loads, once torch first uses the card. Assumed: it
# differs by card and release. No figures by card are published for a torch that loads kernels lazily; one tensor and
# a convolution net take some 300 MiB since CUDA 11.7 (pytorch/pytorch#107667), 1000 and more before
# (pytorch/pytorch#55277). `vramplan calibrate` measures it.
_CONTEXT_BYTES = 512 * MIB
_CONTEXT_KINDS = ("cuda", "rocm", "xpu")

# What a desktop and a browser may take more of the card they are drawn on while the pipeline runs: what ComfyUI
# reserves for them (EXTRA_RESERVED_VRAM, model_management.py, 2024 to 2026). Nobody's measurement is known.
_OTHERS_BYTES = 400 * MIB
# Where the pool is the host's too, running out takes the machine down and not the process alone
# (sgl-project/sglang#37811), so more is kept; unsloth keeps the same.
_UNIFIED_SHARE, _UNIFIED_LEAST = 0.20, 2 * GIB
# Cards give programs up to a tenth less than the size in their name: 14.56 GiB of a T4's 16 (its profile).
_NOMINAL_EXCESS = 1.1
# The interpreter, the libraries and other programs, on the host.
_RESERVE_SHARE, _RESERVE_LEAST = 0.05, 1 * GIB


def make_budget(
    hardware: Hardware,
    *,
    accelerator: Accelerator | None = None,
    vram: str | None = None,
    ram: str | None = None,
    margin: str | None = None,
    error: ProjectionError,
    context_bytes: int | None = None,
    held_vram_bytes: int = 0,
    held_ram_bytes: int = 0,
) -> Budget:
    """What a plan may use of this machine, in bytes, and what was taken off to get there.

    What is free (the total, where that is not known) less every `vram` deduction is `vram_bytes`; the same
    holds for `ram`. An amount the user gives is taken as it is, with nothing deducted; `margin` then plays no
    part. On unified memory `vram_bytes` and `ram_bytes` are two views of one pool: they do not add up.

    The margin is what projections may be too low by: a projection within `vram_bytes` that is as far off is still
    within what is free. What other programs may take is apart from it.

    Args:
        hardware: the machine.
        accelerator: the device to plan for; the machine's first one where not given.
        vram: how much device memory may be used: `12GiB`, `-1GiB` (free less that), `85%` (of the total).
        ram: the same for host memory.
        margin: how much device memory to keep free: `2GiB`, `10%`, `0`. Nothing is kept for other programs then.
        error: how far projections of the plan's kind may be too low; simulated ones where not given.
        context_bytes: what the driver takes for itself, where that was measured.
        held_vram_bytes: what the pipeline that is being placed holds already, which is given back; likewise in RAM.

    Raises:
        UsageError: not an amount, or more than the device has.
        NothingFitsError: nothing is left to use.
    """
    device = accelerator or next(iter(hardware.accelerators), None)
    if device is None and vram is not None:
        raise UsageError(f"vram {vram}: this machine has no accelerator: name a card with `device`, or leave it out")
    taken: list[Deduction] = []
    if device is not None and vram is None:
        taken += _vram_deductions(device, hardware.host, context_bytes, held_vram_bytes)
        taken += _kept_free(device, margin, error, held_vram_bytes, _sum(taken))
    if ram is None:
        taken += _present([_reserve(hardware.host), _given_back("ram", held_ram_bytes)])
    return Budget(
        vram_bytes=None if device is None else _vram_bytes(device, hardware.host, vram, taken),
        ram_bytes=_ram_bytes(hardware.host, ram, taken),
        disk_bytes=_disk_bytes(hardware.host),
        deductions=tuple(taken),
    )


def _vram_bytes(device: Accelerator, host: Host, amount: str | None, taken: list[Deduction]) -> int:
    if amount is None:
        return _rest("vram", device.name, _free(device), taken)
    pool = min(_free(device), host.available_bytes) if device.unified else _free(device)
    count = parse_amount(amount, free_bytes=pool, total_bytes=device.total_bytes, name="vram")
    if device.total_bytes < count <= device.total_bytes * _NOMINAL_EXCESS:
        taken.append(_nominal(amount, count - device.total_bytes, device))
        return device.total_bytes
    if count > device.total_bytes:
        has = f"{device.name} has {format_bytes(device.total_bytes)} in total"
        raise UsageError(f"vram {amount} is {format_bytes(count)}, but {has}: give less, or plan for another device")
    return count


def _nominal(amount: str, excess: int, device: Accelerator) -> Deduction:
    """What the name of a card promises and its driver keeps."""
    reason = f"{device.name} has {format_bytes(device.total_bytes)} of the {amount} asked for"
    return Deduction(memory="vram", name="not there", size_bytes=excess, reason=reason)


def _ram_bytes(host: Host, amount: str | None, taken: list[Deduction]) -> int:
    if amount is None:
        return _rest("ram", "this machine", host.available_bytes, taken)
    total = _usable_total(host)
    return parse_amount(amount, free_bytes=host.available_bytes, total_bytes=total, name="ram")


def _disk_bytes(host: Host) -> int | None:
    """What is free, less what offloading leaves free; nothing where the disk is RAM in truth."""
    if host.disk_in_memory:
        return 0
    return None if host.disk_free_bytes is None else max(0, host.disk_free_bytes - DISK_LEFT_FREE)


def _rest(memory: str, owner: str, start: int, taken: list[Deduction]) -> int:
    """What the deductions leave of the start.

    Raises:
        NothingFitsError: nothing, with every number.
    """
    ours = [item for item in taken if item.memory == memory]
    rest = start - _sum(ours)
    if rest <= 0:
        terms = ", ".join(f"{item.name} {format_bytes(item.size_bytes)}" for item in ours)
        message = f"no {memory.upper()} is left to use: {owner} has {format_bytes(start)} free, less {terms}"
        raise NothingFitsError(f"{message}; close other programs, or say how much may be used with `{memory}`")
    return rest


def _free(device: Accelerator) -> int:
    return device.total_bytes if device.free_bytes is None else device.free_bytes


def _sum(items: list[Deduction]) -> int:
    return sum(item.size_bytes for item in items)


def _present(items: list[Deduction | None]) -> list[Deduction]:
    return [item for item in items if item is not None]


def _vram_deductions(device: Accelerator, host: Host, context_bytes: int | None, held_bytes: int) -> list[Deduction]:
    given = _given_back("vram", held_bytes)
    shared = [_unknown_free(device), _host_share(device, host)]
    return _present([*shared, _context(device, context_bytes), given])


def _given_back(memory: Literal["vram", "ram"], held_bytes: int) -> Deduction | None:
    if not held_bytes:
        return None
    reason = "its weights are there already and are what is being placed"
    return Deduction(memory=memory, name="this pipeline", size_bytes=-held_bytes, reason=reason)


def _unknown_free(device: Accelerator) -> Deduction | None:
    """A deduction of nothing, so that the missing number is seen."""
    if device.free_bytes is not None:
        return None
    reason = "the driver does not say how much is free: all of it is taken to be"
    return Deduction(memory="vram", name="in use", size_bytes=0, reason=reason)


def _host_share(device: Accelerator, host: Host) -> Deduction | None:
    """What the device calls free of a shared pool, but the host cannot give any more."""
    excess = _free(device) - host.available_bytes
    if not device.unified or excess <= 0:
        return None
    reason = f"device and host share one memory, of which {format_bytes(host.available_bytes)} is available"
    return Deduction(memory="vram", name="in use by the host", size_bytes=excess, reason=reason)


def _process_limit(device: Accelerator, held_bytes: int, rest: int) -> Deduction | None:
    """What would be free but torch may not take, by the share of the total that the program set for itself.

    What the driver and other programs take does not count towards the share, so they come first.
    """
    if device.own is None or device.own.fraction >= 1:
        return None
    most = device.own.limit_bytes
    most = int(device.total_bytes * device.own.fraction) if most is None else most
    excess = rest - max(0, most - device.own.allocated_bytes) - held_bytes
    reason = f"torch may use {device.own.fraction:.0%} of the total in this process (set_per_process_memory_fraction)"
    return Deduction(memory="vram", name="process limit", size_bytes=excess, reason=reason) if excess > 0 else None


def _context(device: Accelerator, measured_bytes: int | None) -> Deduction | None:
    if device.kind not in _CONTEXT_KINDS or (device.own is not None and device.own.has_context):
        return None
    size = _CONTEXT_BYTES if measured_bytes is None else measured_bytes
    known = "assumed, not measured: `vramplan calibrate`" if measured_bytes is None else "measured on this machine"
    reason = f"the driver takes it when torch first uses the device ({known})"
    return Deduction(memory="vram", name="driver context", size_bytes=size, reason=reason)


def _kept_free(
    device: Accelerator, margin: str | None, error: ProjectionError, held_bytes: int, taken_bytes: int
) -> Iterator[Deduction]:
    """Of what is left: what other programs may take, what torch may not, and what projections may be too low by, or
    what was asked for."""
    rest = _free(device) - taken_bytes
    others = None if margin is not None or device.unified else _others(device)
    if others is not None:
        yield others
        rest -= others.size_bytes
    limit = _process_limit(device, held_bytes, rest)
    if limit is not None:
        yield limit
        rest -= limit.size_bytes
    yield _margin(device, margin, error, rest)


def _margin(device: Accelerator, margin: str | None, error: ProjectionError, rest: int) -> Deduction:
    size, reason = error.margin_bytes(max(0, rest)), error.reason
    if margin is not None:
        size, reason = _margin_bytes(margin, device.total_bytes), f"kept free on purpose, as asked for: {margin}"
    elif device.unified:
        kept = max(_UNIFIED_LEAST, int(device.total_bytes * _UNIFIED_SHARE))
        if kept >= size:
            rule = _rule(_UNIFIED_SHARE, _UNIFIED_LEAST)
            size, reason = kept, f"kept free for the system and other programs: {rule}"
    return Deduction(memory="vram", name="margin", size_bytes=size, reason=reason)


def _others(device: Accelerator) -> Deduction | None:
    """What a desktop may take more of; nothing on a card that draws none."""
    if device.display is False:
        return None
    drawn = "a desktop is drawn on this card" if device.display else "whether it draws a desktop is not known"
    reason = f"a desktop, a browser or another program may need it while the pipeline runs: {drawn}"
    return Deduction(memory="vram", name="other programs", size_bytes=_OTHERS_BYTES, reason=reason)


def _margin_bytes(amount: str, total_bytes: int) -> int:
    """A margin may be nothing at all, which an amount to use may not."""
    if amount.strip() == "0%":
        return 0
    if amount.strip().endswith("%"):
        return parse_amount(amount, free_bytes=None, total_bytes=total_bytes, name="margin")
    return parse_bytes(amount, name="margin")


def _reserve(host: Host) -> Deduction:
    size = max(_RESERVE_LEAST, int(_usable_total(host) * _RESERVE_SHARE))
    reason = f"kept free for the system and this program: {_rule(_RESERVE_SHARE, _RESERVE_LEAST)}"
    return Deduction(memory="ram", name="reserve", size_bytes=size, reason=reason)


def _usable_total(host: Host) -> int:
    return host.total_bytes if host.limit_bytes is None else host.limit_bytes


def _rule(share: float, least: int) -> str:
    return f"{share:.0%} of the total, at least {format_bytes(least)}"
