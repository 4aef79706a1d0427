"""Which machine a plan is for: this one, a card of it, or one that a profile describes."""

from __future__ import annotations

from dataclasses import replace

from vramplan.errors import UsageError
from vramplan.hardware import detect
from vramplan.hardware.types import Accelerator, Hardware
from vramplan.units import format_bytes, parse_amount


def choose_machine(device: str | Hardware | None, *, vram: str | None = None) -> tuple[Hardware, Accelerator | None]:
    """The machine to plan for and the accelerator of it that is used, None for the CPU.

    Without a device, on a machine that has none, an absolute `vram` stands for a card of that size.

    Raises:
        UsageError: a device that this machine does not have and no profile describes.
    """
    if isinstance(device, Hardware):
        return device, next(iter(device.accelerators), None)
    hardware = detect()
    if device == "cpu":
        return replace(hardware, accelerators=()), None
    if device is None and not hardware.accelerators and vram is not None:
        card = _any_card(parse_amount(vram, free_bytes=None, total_bytes=None, name="vram"))
        return replace(hardware, accelerators=(card,)), card
    if device is None:
        return hardware, _with_rates(next(iter(hardware.accelerators), None))
    for accelerator in hardware.accelerators:
        if device in (accelerator.device, accelerator.kind, accelerator.uuid):
            return hardware, _with_rates(accelerator)
    return _elsewhere(device, hardware)


def _any_card(size: int) -> Accelerator:
    name = f"a CUDA device of {format_bytes(size)}"
    return Accelerator(kind="cuda", index=0, name=name, total_bytes=size, free_bytes=size)


def _elsewhere(device: str, hardware: Hardware) -> tuple[Hardware, Accelerator]:
    """A card this machine does not hold, with the host memory of this machine, or the one it shares with its own."""
    from vramplan.profiles import device_accelerator, device_host, load_device_profile

    if device.partition(":")[0] in ("cuda", "xpu", "mps", "rocm"):
        names = ", ".join(item.device for item in hardware.accelerators) or "none, so the plan would be for cpu"
        raise UsageError(f"device {device}: this machine has {names}")
    profile = load_device_profile(device)
    accelerator = device_accelerator(profile)
    return replace(hardware, accelerators=(accelerator,), host=device_host(profile, hardware.host)), accelerator


def _with_rates(accelerator: Accelerator | None) -> Accelerator | None:
    from vramplan.profiles import rates_for

    if accelerator is None or accelerator.rates is not None:
        return accelerator
    return replace(accelerator, rates=rates_for(accelerator.name, accelerator.total_bytes))
