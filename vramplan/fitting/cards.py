"""Group the device profiles by memory size and kind of card."""

from __future__ import annotations

from dataclasses import dataclass

from vramplan.profiles.catalogue import DeviceProfile, device_accelerator, device_profiles
from vramplan.units import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class CardSize:
    """Devices that get the same plan: the name and memory in bytes of the least, and the names of the others (`alike`).

    `kind` is equal for devices that differ only in size and rates."""

    name: str
    kind: tuple[object, ...]
    memory_bytes: int
    alike: tuple[str, ...]


def card_sizes() -> tuple[CardSize, ...]:
    """Group all device profiles by GiB of memory (rounded; the host's or their own) and kernels, smallest first.

    The least device of a group has the least memory and, among equals, the lowest rate."""
    sizes: dict[tuple[object, ...], list[DeviceProfile]] = {}
    for profile in device_profiles():
        sizes.setdefault((*_kind(profile), round(profile.memory_bytes / GIB)), []).append(profile)
    ordered = [
        sorted(alike, key=lambda item: (item.memory_bytes, item.half_tflops, item.name)) for alike in sizes.values()
    ]
    return tuple(
        CardSize(
            name=least.name,
            kind=_kind(least),
            memory_bytes=least.memory_bytes,
            alike=tuple(item.name for item in others),
        )
        for least, *others in sorted(ordered, key=lambda alike: (alike[0].memory_bytes, alike[0].name))
    )


def _kind(profile: DeviceProfile) -> tuple[object, ...]:
    """The properties of a card that a plan depends on, except rates and the exact size."""
    from vramplan.simulator.model import kernels_of

    accelerator = device_accelerator(profile)
    kernels = tuple(kernels_of(accelerator).values())
    return accelerator.unified, accelerator.has_streams, *kernels
