"""Choose the machine to plan for: this one, one of its cards, or one from a profile or a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vramplan.errors import UsageError
from vramplan.hardware.detect import detect
from vramplan.hardware.file import is_hardware_file, load_hardware
from vramplan.hardware.types import Accelerator, Budget, Hardware, Measurement
from vramplan.planner.budget import make_budget
from vramplan.planner.residuals import Basis
from vramplan.units import format_bytes, parse_amount


def choose_machine(device: str | Hardware | None, *, vram: str | None = None) -> tuple[Hardware, Accelerator | None]:
    """Return the machine to plan for and its accelerator to use, None for the CPU.

    The accelerator has its known rates: measured on this machine, or from its profile with the link speed read in the
    machine. The programs that use it are left out, since plans may be shared.

    Raises:
        UsageError: a device that this machine does not have and no profile describes.
        VramplanError: a file that holds no machine.
    """
    hardware, accelerator = find_machine(device, vram=vram)
    if accelerator is None or isinstance(device, Hardware):
        return hardware, accelerator
    of_a_file = isinstance(device, str) and is_hardware_file(device)
    measured = (*accelerator.measured, *hardware.host.measured) if of_a_file else None
    return hardware, _with_rates(replace(accelerator, others=None), measured)


def find_machine(device: str | Hardware | None, *, vram: str | None = None) -> tuple[Hardware, Accelerator | None]:
    """Return the machine and accelerator as detected, without rates: their lookup takes longer than detection itself.

    On a machine without accelerators, if no device is given, an absolute `vram` stands for a card of that size.

    Raises:
        UsageError: a device that this machine does not have and no profile describes.
        VramplanError: a file that holds no machine.
    """
    if isinstance(device, str) and is_hardware_file(device):
        device = load_hardware(device)
    if isinstance(device, Hardware):
        return device, next(iter(device.accelerators), None)
    hardware = detect()
    if device == "cpu":
        return replace(hardware, accelerators=()), None
    if device is None and not hardware.accelerators and vram is not None:
        card = _generic_card(parse_amount(vram, free_bytes=None, total_bytes=None, name="vram"))
        hardware = replace(hardware, accelerators=(card,))
    if device is None:
        return _with_store_notes(hardware), next(iter(hardware.accelerators), None)
    for accelerator in hardware.accelerators:
        if device.casefold() in _names(accelerator):
            return _with_store_notes(hardware), accelerator
    return _profiled_machine(device, hardware)


def _names(accelerator: Accelerator) -> tuple[str, ...]:
    """The names it may be given by: `cuda:0`, `mps:0`, its kind, its identifier, or `cuda` for the first match."""
    backend = accelerator.device.partition(":")[0]
    names = (accelerator.device, f"{backend}:{accelerator.index}", accelerator.kind, backend, accelerator.uuid or "")
    return tuple(name.casefold() for name in names if name)


def known_budget(
    hardware: Hardware,
    accelerator: Accelerator | None,
    amounts: Mapping[str, Any],
    *,
    basis: Basis = "simulated",
    pipeline: str | None = None,
    kinds: tuple[str, ...] = (),
) -> Budget:
    """The budget for plans of this basis and of calls of these kinds, from measurements of this machine; `amounts` are
    `make_budget`'s arguments.

    Raises:
        UsageError, NothingFitsError: as `make_budget` does.
    """
    from vramplan.calibration.learned import learned

    known = learned(accelerator, basis, pipeline, kinds)
    budget = make_budget(
        hardware, accelerator=accelerator, error=known.error, context_bytes=known.context_bytes, **amounts
    )
    return replace(budget, kinds=kinds)


def measure_here(hardware: Hardware, accelerator: Accelerator | None, device: str | None) -> Hardware:
    """Return the machine with its speed, measured now or before.

    Raises:
        UsageError: the device is not in this machine, so that nothing can be measured.
    """
    from vramplan.hardware.measurements import measure_machine

    names = ("cpu",) if accelerator is None else _names(accelerator)
    if device is not None and device.casefold() not in names:
        raise UsageError(f"device {device} is not in this machine; leave `device` out to measure what is")
    return measure_machine(hardware, accelerator)


def _generic_card(size: int) -> Accelerator:
    name = f"a CUDA device of {format_bytes(size)}"
    return Accelerator(kind="cuda", index=0, name=name, total_bytes=size, free_bytes=size)


def _profiled_machine(device: str, hardware: Hardware) -> tuple[Hardware, Accelerator]:
    """The machine with the profile's card in place of its own, and this host's RAM unless the card shares memory."""
    from vramplan.profiles.catalogue import device_accelerator, device_host, load_device_profile

    if device.partition(":")[0] in ("cuda", "xpu", "mps", "rocm"):
        names = ", ".join(item.device for item in hardware.accelerators) or "no accelerator"
        notes = "".join(f"; {note}" for note in hardware.notes)  # such as a driver that does not answer
        advice = "any card can be planned for by its name, as rtx-4070 (vramplan profiles list)"
        raise UsageError(f"device {device}: this machine has {names}{notes}; {advice}")
    profile = load_device_profile(device)
    accelerator = device_accelerator(profile)
    return replace(hardware, accelerators=(accelerator,), host=device_host(profile, hardware.host)), accelerator


def _with_store_notes(hardware: Hardware) -> Hardware:
    """The machine with notes on unreadable stored measurements, if it has an accelerator."""
    from vramplan.calibration.store import read_store

    return replace(hardware, notes=(*hardware.notes, *read_store().notes)) if hardware.accelerators else hardware


def _with_rates(accelerator: Accelerator, measured: Sequence[Measurement] | None) -> Accelerator:
    """The accelerator with its known rates, with those that its file says were measured; None is this machine.

    They have an uncertainty, unless the card's peak is assumed.
    """
    from vramplan.calibration.published_errors import with_published_uncertainty
    from vramplan.profiles.catalogue import rates_for, with_link

    if accelerator.rates is not None:
        return with_published_uncertainty(accelerator)
    link = accelerator.link_bytes_per_s
    card = replace(accelerator, rates=rates_for(accelerator.name, accelerator.total_bytes, link))
    profiled = card.rates is not None
    from vramplan.calibration.measured_rates import with_measured_rates, with_measurements

    card = with_measured_rates(card) if measured is None else with_measurements(card, measured)
    if profiled or (card.rates is not None and "products" in card.rates.measured):
        card = with_published_uncertainty(card)
    if card.rates is None and link is not None:
        from vramplan.planner.clock import DEFAULT_RATES

        assumed = replace(DEFAULT_RATES, source="assumed: a mid-range card")
        card = replace(card, rates=with_link(assumed, link))
    return card
