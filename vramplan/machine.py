"""Which machine a plan is for: this one, a card of it, or one that a profile describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vramplan.errors import UsageError
from vramplan.hardware import detect, make_budget
from vramplan.hardware.types import Accelerator, Budget, Hardware
from vramplan.residuals import Basis
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
        return _read(hardware, next(iter(hardware.accelerators), None))
    for accelerator in hardware.accelerators:
        if device in (accelerator.device, accelerator.kind, accelerator.uuid):
            return _read(hardware, accelerator)
    return _elsewhere(device, hardware)


def known_budget(
    hardware: Hardware,
    accelerator: Accelerator | None,
    amounts: Mapping[str, Any],
    *,
    basis: Basis = "simulated",
    pipeline: str | None = None,
) -> Budget:
    """The budget for plans of this basis, with what was measured on this machine; `amounts` are `make_budget`'s.

    Raises:
        UsageError: as `make_budget` does.
    """
    from vramplan.calibration.learned import learned

    known = learned(accelerator, basis, pipeline)
    return make_budget(
        hardware, accelerator=accelerator, error=known.error, context_bytes=known.context_bytes, **amounts
    )


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


def _read(hardware: Hardware, accelerator: Accelerator | None) -> tuple[Hardware, Accelerator | None]:
    """This machine and a card of it, with its rates and what could not be read of earlier measurements."""
    from vramplan.calibration.learned import with_measured_rates
    from vramplan.calibration.store import read_store
    from vramplan.profiles import rates_for

    if accelerator is None:
        return hardware, None
    notes = read_store().notes
    if accelerator.rates is None:
        accelerator = with_measured_rates(replace(accelerator, rates=rates_for(accelerator.name)))
    return replace(hardware, notes=(*hardware.notes, *notes)), accelerator
