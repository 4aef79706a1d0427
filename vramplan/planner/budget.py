"""Compute the budget of a plan from the hardware. Pure: the same hardware gives the same budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from vramplan.errors import NothingFitsError, UsageError
from vramplan.hardware.host import DISK_LEFT_FREE
from vramplan.hardware.types import Accelerator, Budget, Deduction, Hardware, Host
from vramplan.planner.residuals import ProjectionError
from vramplan.units import GIB, MIB, format_bytes, parse_amount, parse_bytes

# Bytes of the driver's context and its kernels once torch first uses the card. Assumed: it differs by card and release.
# With lazily loaded kernels (CUDA 11.7) one tensor and a convolution net take some 300 MiB (pytorch/pytorch#107667),
# 1000 and more before (pytorch/pytorch#55277). `vramplan calibrate` measures it.
_CONTEXT_BYTES = 512 * MIB
_CONTEXT_KINDS = ("cuda", "rocm", "xpu")

# Bytes that a desktop and a browser may take in addition while the pipeline runs: the reserve of ComfyUI
# (EXTRA_RESERVED_VRAM, model_management.py, 2024 to 2026). No measurement is known.
_OTHERS_BYTES = 400 * MIB
# On unified memory running out takes down the machine, not only the process (sgl-project/sglang#37811), so more is kept
# free; unsloth keeps the same.
_UNIFIED_SHARE, _UNIFIED_LEAST = 0.20, 2 * GIB
# Cards give programs up to a tenth less than the size in their name: 14.56 GiB of a T4's 16 (its profile).
_NOMINAL_EXCESS = 1.1
# The interpreter, the libraries and other programs, on the host.
_RESERVE_SHARE, _RESERVE_LEAST = 0.05, 1 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """The budget for candidates with the weights as they are stored, and that for changed weights, less well known."""

    stored: Budget
    quantized: Budget

    def of(self, weights: Mapping[str, object]) -> Budget:
        """The budget for a candidate with these settings of the weights."""
        return self.quantized if weights else self.stored


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
    """Return the memory that a plan may use on this machine, in bytes, with the deductions that led to it.

    `vram_bytes` is the free memory (the total, if free is unknown) less every `vram` deduction; `ram_bytes` likewise.
    An amount that the user gives is used unchanged, without deductions or margin. On unified memory `vram_bytes` and
    `ram_bytes` are two views of one pool: they do not add up.

    The margin covers the error of projections: a projection within `vram_bytes` that is too low by as much is still
    within the free memory. The reserve for other programs is a separate deduction.

    Args:
        hardware: the machine.
        accelerator: the device to plan for; by default the machine's first.
        vram: device memory that may be used: `12GiB`, `-1GiB` (free less that), `85%` (of the total).
        ram: the same for host memory.
        margin: device memory to keep free: `2GiB`, `10%`, `0`. It replaces the reserve for other programs.
        error: the bound on how far projections are too low.
        context_bytes: the size of the driver context, if measured.
        held_vram_bytes: device memory that the pipeline to be placed holds already; it counts as free.
        held_ram_bytes: the same for host memory.

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
    """The difference between the nominal size of a card and its usable total."""
    reason = f"{device.name} has {format_bytes(device.total_bytes)} of the {amount} asked for"
    return Deduction(memory="vram", name="not there", size_bytes=excess, reason=reason)


def _ram_bytes(host: Host, amount: str | None, taken: list[Deduction]) -> int:
    if amount is None:
        return _rest("ram", "this machine", host.available_bytes, taken)
    total = _usable_total(host)
    return parse_amount(amount, free_bytes=host.available_bytes, total_bytes=total, name="ram")


def _disk_bytes(host: Host) -> int | None:
    """The free disk space, less the part that offloading leaves free; 0 if the disk is in RAM."""
    if host.disk_in_memory:
        return 0
    return None if host.disk_free_bytes is None else max(0, host.disk_free_bytes - DISK_LEFT_FREE)


def _rest(memory: str, owner: str, start: int, taken: list[Deduction]) -> int:
    """Subtract the deductions from the start. Raises NothingFitsError with every number if nothing is left."""
    deductions = [item for item in taken if item.memory == memory]
    rest = start - _sum(deductions)
    if rest <= 0:
        terms = ", ".join(f"{item.name} {format_bytes(item.size_bytes)}" for item in deductions)
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
    held = _given_back("vram", held_bytes)
    return _present([_unknown_free(device), _host_share(device, host), _context(device, context_bytes), held])


def _given_back(memory: Literal["vram", "ram"], held_bytes: int) -> Deduction | None:
    if not held_bytes:
        return None
    reason = "its weights are there already and are what is being placed"
    return Deduction(memory=memory, name="this pipeline", size_bytes=-held_bytes, reason=reason)


def _unknown_free(device: Accelerator) -> Deduction | None:
    """A deduction of 0 that shows that the free memory is unknown."""
    if device.free_bytes is not None:
        return None
    reason = "the driver does not say how much is free: all of it is taken to be"
    return Deduction(memory="vram", name="in use", size_bytes=0, reason=reason)


def _host_share(device: Accelerator, host: Host) -> Deduction | None:
    """The part of a shared pool that the device reports as free, but the host does not."""
    excess = _free(device) - host.available_bytes
    if not device.unified or excess <= 0:
        return None
    reason = f"device and host share one memory, of which {format_bytes(host.available_bytes)} is available"
    return Deduction(memory="vram", name="in use by the host", size_bytes=excess, reason=reason)


def _process_limit(device: Accelerator, held_bytes: int, rest: int) -> Deduction | None:
    """Free memory above the share of the total that the program set for torch.

    The driver context and other programs do not count towards that share, so they are deducted first.
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
    """Deduct from the rest: the reserve for other programs, the process limit, and the margin."""
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
    """The reserve for a desktop and other programs; None on a card without a display."""
    if device.display is False:
        return None
    drawn = "a desktop is drawn on this card" if device.display else "whether it draws a desktop is not known"
    reason = f"a desktop, a browser or another program may need it while the pipeline runs: {drawn}"
    return Deduction(memory="vram", name="other programs", size_bytes=_OTHERS_BYTES, reason=reason)


def _margin_bytes(amount: str, total_bytes: int) -> int:
    """Parse a margin, which may be 0, unlike an amount to use."""
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
