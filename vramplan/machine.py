"""Which machine a plan is for: this one, a card of it, or one that a profile or a file describes."""

from __future__ import annotations

from dataclasses import replace

from vramplan.errors import UsageError
from vramplan.hardware import detect
from vramplan.hardware.types import Accelerator, Hardware
from vramplan.hardwarefile import is_hardware_file, load_hardware
from vramplan.units import format_bytes, parse_amount


def choose_machine(device: str | Hardware | None, *, vram: str | None = None) -> tuple[Hardware, Accelerator | None]:
    """The machine to plan for and the accelerator of it that is used, None for the CPU.

    Without a device, on a machine that has none, an absolute `vram` stands for a card of that size.

    Raises:
        UsageError: a device that this machine does not have and no profile describes.
        VramplanError: a file that holds no machine.
    """
    if isinstance(device, str) and is_hardware_file(device):
        written = load_hardware(device)
        return written, _with_rates(next(iter(written.accelerators), None))
    if isinstance(device, Hardware):
        return device, next(iter(device.accelerators), None)
    hardware = detect()
    if device == "cpu":
        return replace(hardware, accelerators=()), None
    if device is None and not hardware.accelerators and vram is not None:
        card = _any_card(parse_amount(vram, free_bytes=None, total_bytes=None, name="vram"))
        hardware = replace(hardware, accelerators=(card,))
    if device is None:
        return hardware, _with_rates(next(iter(hardware.accelerators), None))
    for accelerator in hardware.accelerators:
        if device in (accelerator.device, accelerator.kind, accelerator.uuid):
            return hardware, _with_rates(accelerator)
    return _elsewhere(device, hardware)


def measure_here(hardware: Hardware, accelerator: Accelerator | None, device: str | None) -> Hardware:
    """The machine with its speed, measured now or before.

    Raises:
        UsageError: the device is not in this machine, so that nothing can be measured.
    """
    from vramplan.hardware.measuring import measure_machine

    names = ("cpu",) if accelerator is None else (accelerator.device, accelerator.kind, accelerator.uuid)
    if device is not None and device not in names:
        raise UsageError(f"--measure: {device} is not in this machine; leave --device out to measure what is")
    return measure_machine(hardware, accelerator)


def _any_card(size: int) -> Accelerator:
    name = f"a CUDA device of {format_bytes(size)}"
    return Accelerator(kind="cuda", index=0, name=name, total_bytes=size, free_bytes=size)


def _elsewhere(device: str, hardware: Hardware) -> tuple[Hardware, Accelerator]:
    """A card this machine does not hold, with the host memory of this machine."""
    from vramplan.profiles import device_accelerator, load_device_profile

    if device.partition(":")[0] in ("cuda", "xpu", "mps", "rocm"):
        names = ", ".join(item.device for item in hardware.accelerators) or "none, so the plan would be for cpu"
        raise UsageError(f"device {device}: this machine has {names}")
    accelerator = device_accelerator(load_device_profile(device))
    return replace(hardware, accelerators=(accelerator,)), accelerator


def _with_rates(accelerator: Accelerator | None) -> Accelerator | None:
    """The accelerator with what is known of its speed. Whose programs use it now is nobody else's business, and a
    plan may be passed on."""
    if accelerator is None:
        return None
    from vramplan.profiles import rates_for

    return replace(accelerator, rates=accelerator.rates or rates_for(accelerator.name), others=None)
