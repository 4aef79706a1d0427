"""The device profiles by the size of their memory, one for each size and kind of card."""

from __future__ import annotations

from dataclasses import dataclass

from vramplan.profiles.catalogue import DeviceProfile, device_accelerator, device_profiles
from vramplan.units import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class CardSize:
    """Devices that are planned for alike: the name of the least of them, its memory, and the names of the others.

    `kind` is the same for sizes that differ in nothing else."""

    name: str
    kind: tuple[object, ...]
    memory_bytes: int
    alike: tuple[str, ...]


def card_sizes() -> tuple[CardSize, ...]:
    """Every device profile, those together that have as many whole GiB of memory, the host's or their own, and the same
    kernels; the smallest first. The least of each has the least memory, and of these the lowest rate."""
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
    """What a plan depends on beside rates and the exact size."""
    from vramplan.simulator.model import kernels_of

    accelerator = device_accelerator(profile)
    kernels = tuple(kernels_of(accelerator).values())
    return accelerator.unified, accelerator.has_streams, *kernels
