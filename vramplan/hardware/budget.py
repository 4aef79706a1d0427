"""From what a machine has to what a plan may use of it. Pure: the same hardware gives the same budget."""

from __future__ import annotations

from vramplan.errors import UsageError
from vramplan.hardware.types import Accelerator, Budget, Deduction, Hardware, Host
from vramplan.units import GIB, MIB, format_bytes, parse_amount, parse_bytes

# What a driver takes for its own context and the kernels it loads, once torch first uses the card. Assumed:
# it differs by card and torch release (huggingface/diffusers#1905), and only a measurement says better.
_CONTEXT_BYTES = 512 * MIB
_CONTEXT_KINDS = ("cuda", "rocm", "xpu")

# What a desktop, a browser or the allocator's fragments may take while the pipeline runs: a choice, between
# the 1 GiB that llama.cpp's `--fit-target` keeps and the sixteenth, at least 512 MiB, of smaller tools.
_MARGIN_SHARE, _MARGIN_LEAST = 0.06, 512 * MIB
# Where the pool is the host's too, running out takes the machine down and not the process alone
# (sgl-project/sglang#37811), so more is kept; unsloth keeps the same.
_UNIFIED_SHARE, _UNIFIED_LEAST = 0.20, 2 * GIB
# Cards give programs up to a tenth less than the size in their name: 14.56 GiB of a T4's 16 (its profile).
_NOMINAL_EXCESS = 1.1
# Kept free on the disk that weights are offloaded to. Assumed.
DISK_LEFT_FREE = 1 * GIB
# The interpreter, the libraries and other programs, on the host.
_RESERVE_SHARE, _RESERVE_LEAST = 0.05, 1 * GIB


def make_budget(
    hardware: Hardware,
    *,
    accelerator: Accelerator | None = None,
    vram: str | None = None,
    ram: str | None = None,
    margin: str | None = None,
) -> Budget:
    """What a plan may use of this machine, in bytes, and what was taken off to get there.

    What is free (the total, where that is not known) less every `vram` deduction is `vram_bytes`; the same
    holds for `ram`. An amount the user gives is taken as it is, with nothing deducted; `margin` then plays no
    part. On unified memory `vram_bytes` and `ram_bytes` are two views of one pool: they do not add up.

    Args:
        hardware: the machine.
        accelerator: the device to plan for; the machine's first one where not given.
        vram: how much device memory may be used: `12GiB`, `-1GiB` (free less that), `85%` (of the total).
        ram: the same for host memory.
        margin: how much device memory to keep free: `2GiB`, `10%`, `0`.

    Raises:
        UsageError: not an amount, more than the device has, or nothing is left to use.
    """
    device = accelerator or next(iter(hardware.accelerators), None)
    if device is None and vram is not None:
        raise UsageError(f"vram {vram}: this machine has no accelerator; name one to plan for, or leave vram out")
    taken: list[Deduction] = []
    if device is not None and vram is None:
        taken += _vram_deductions(device, hardware.host, margin)
    if ram is None:
        taken.append(_reserve(hardware.host))
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
        UsageError: nothing, with every number.
    """
    ours = [item for item in taken if item.memory == memory]
    rest = start - sum(item.size_bytes for item in ours)
    if rest <= 0:
        terms = ", ".join(f"{item.name} {format_bytes(item.size_bytes)}" for item in ours)
        message = f"no {memory} is left to use: {owner} has {format_bytes(start)}, less {terms}"
        raise UsageError(f"{message}; close other programs, or say how much may be used with {memory}=AMOUNT")
    return rest


def _free(device: Accelerator) -> int:
    return device.total_bytes if device.free_bytes is None else device.free_bytes


def _vram_deductions(device: Accelerator, host: Host, margin: str | None) -> list[Deduction]:
    found = [
        _unknown_free(device),
        _host_share(device, host),
        _process_limit(device, host),
        _display(device),
        _context(device),
        _margin(device, margin),
    ]
    return [item for item in found if item is not None]


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


def _process_limit(device: Accelerator, host: Host) -> Deduction | None:
    """What is free but torch may not take, by the share of the total that the program set for itself."""
    if device.own is None or device.own.fraction >= 1:
        return None
    allowed = int(device.total_bytes * device.own.fraction) - device.own.allocated_bytes
    reason = f"torch may use {device.own.fraction:.0%} of the total in this process (set_per_process_memory_fraction)"
    pool = min(_free(device), host.available_bytes) if device.unified else _free(device)
    excess = pool - max(0, allowed)
    if excess <= 0:
        return None
    return Deduction(memory="vram", name="process limit", size_bytes=excess, reason=reason)


def _display(device: Accelerator) -> Deduction | None:
    """A deduction of nothing: what a display shows is in use already, and counting it again would be wrong."""
    if not device.display:
        return None
    reason = "the card drives a display, whose memory is not among what is free"
    return Deduction(memory="vram", name="display", size_bytes=0, reason=reason)


def _context(device: Accelerator) -> Deduction | None:
    if device.kind not in _CONTEXT_KINDS or (device.own is not None and device.own.has_context):
        return None
    reason = "the driver takes it when torch first uses the device (assumed, not measured)"
    return Deduction(memory="vram", name="driver context", size_bytes=_CONTEXT_BYTES, reason=reason)


def _margin(device: Accelerator, amount: str | None) -> Deduction:
    if amount is not None:
        size, reason = (
            _margin_bytes(amount, device.total_bytes),
            f"kept free on purpose, as asked for: {amount}",
        )
    elif device.unified:
        size = max(_UNIFIED_LEAST, int(device.total_bytes * _UNIFIED_SHARE))
        reason = f"kept free for the system and other programs: {_rule(_UNIFIED_SHARE, _UNIFIED_LEAST)}"
    else:
        size = max(_MARGIN_LEAST, int(device.total_bytes * _MARGIN_SHARE))
        reason = f"kept free for other programs and fragments: {_rule(_MARGIN_SHARE, _MARGIN_LEAST)}"
    return Deduction(memory="vram", name="margin", size_bytes=size, reason=reason)


def _margin_bytes(amount: str, total_bytes: int) -> int:
    """A margin may be nothing at all, which an amount to use may not."""
    if amount.strip() == "0%":
        return 0
    if amount.strip().endswith("%"):
        return parse_amount(amount, free_bytes=None, total_bytes=total_bytes, name="margin")
    return parse_bytes(amount)


def _reserve(host: Host) -> Deduction:
    size = max(_RESERVE_LEAST, int(_usable_total(host) * _RESERVE_SHARE))
    reason = f"kept free for the system and this program: {_rule(_RESERVE_SHARE, _RESERVE_LEAST)}"
    return Deduction(memory="ram", name="reserve", size_bytes=size, reason=reason)


def _usable_total(host: Host) -> int:
    return host.total_bytes if host.limit_bytes is None else host.limit_bytes


def _rule(share: float, least: int) -> str:
    return f"{share:.0%} of the total, at least {format_bytes(least)}"
