"""Measure a machine once, and cache the results by device and driver."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from vramplan.common.files import cache_folder, write_text
from vramplan.common.progress import Say
from vramplan.hardware.disk import offload_folder
from vramplan.hardware.types import Accelerator, Hardware, Host, Measurement

# Raised when there is more to measure: what was kept before is then measured again.
_CACHE_VERSION = 2


def measure_machine(hardware: Hardware, accelerator: Accelerator | None) -> Hardware:
    """Return the machine with measured speeds of the accelerator (of the CPU without one) and of the disk.

    Needs torch, and makes a device context in this process. Results for the same device, driver and torch come from
    the user's cache; a measurement that fails leaves a note.
    """
    failed: dict[str, str] = {}
    speeds = _cached(_cache_key(accelerator or hardware.host), lambda: tuple(measure_device(accelerator, failed)))
    disk = () if hardware.host.disk_in_memory else tuple(measure_disk(failed))
    notes = (f"{name} could not be measured: {reason}" for name, reason in failed.items())
    if accelerator is None:
        host, accelerators = replace(hardware.host, measured=(*speeds, *disk)), hardware.accelerators
    else:
        host = replace(hardware.host, measured=disk)
        accelerators = tuple(
            replace(item, measured=speeds) if item.device == accelerator.device else item
            for item in hardware.accelerators
        )
    return replace(hardware, host=host, accelerators=accelerators, notes=(*hardware.notes, *notes))


def kept_measurements(accelerator: Accelerator) -> tuple[Measurement, ...]:
    """The measurements of this device that were kept; empty without any."""
    return _read(_cache_file(_cache_key(accelerator))) or ()


def measure_device(
    accelerator: Accelerator | None, failed: dict[str, str], say: Say = lambda text: None
) -> Iterator[Measurement]:
    """Measure the accelerator, or the CPU: copies, memory, products, attention and kernel launches.

    A measurement that fails is left out, and its reason added to `failed`.
    """
    for name, work in _works(accelerator):
        say(f"measuring {name}")
        try:
            yield from work()
        except Exception as error:  # torch built for another device, a full card, no page-locked memory
            failed[name] = " ".join(str(error).split())[:300] or type(error).__name__


def _works(accelerator: Accelerator | None) -> Iterator[tuple[str, Callable[[], Iterable[Measurement]]]]:
    """What is measured: a name for people, and the work. For the CPU nothing is page-locked."""
    from vramplan.hardware import benchmark

    device, dtype = ("cpu", "float32") if accelerator is None else (accelerator.device, _half(accelerator))
    pinned: tuple[benchmark.Direction, ...] = ("host_to_device_pinned", "device_to_host")
    pageable: tuple[benchmark.Direction, ...] = ("host_to_device_pageable", "device_to_host_pageable")
    for direction in (*(pinned if device != "cpu" else ()), *pageable):
        yield direction.replace("_", " "), partial(_one, benchmark.measure_copy, device, direction)
    yield "memory", partial(_one, benchmark.measure_memory, device)
    yield f"products in {dtype}", partial(benchmark.measure_products, device, dtype)
    for size in benchmark.HEAD_SIZES:
        yield f"attention with heads of {size}", partial(_one, benchmark.measure_attention, device, dtype, size)
    yield "kernel launches", partial(_one, benchmark.measure_launch, device)


def _one(measure: Callable[..., Measurement], *args: Any) -> list[Measurement]:
    return [measure(*args)]


def _half(accelerator: Accelerator) -> str:
    """The half precision that the device computes in, float16 where that is not known."""
    return "bfloat16" if "bfloat16" in accelerator.native else "float16"


def measure_disk(failed: dict[str, str]) -> Iterator[Measurement]:
    """Measure the disk that weights are offloaded to; a failure is added to `failed`."""
    from vramplan.hardware import benchmark

    folder = offload_folder()
    folder = next((path for path in (folder, *folder.parents) if path.is_dir()), folder)
    try:
        yield benchmark.measure_disk_read(folder)
    except OSError as error:
        failed["the disk"] = error.strerror or str(error)


def _cache_key(device: Accelerator | Host) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    # A card in another slot may have another link.
    card = ("uuid", "name", "driver", "link_bytes_per_s")
    facts = card if isinstance(device, Accelerator) else ("total_bytes", "cores", "system")
    torch = None
    with suppress(PackageNotFoundError):  # each measurement then fails with its own note
        torch = version("torch")
    return {name: getattr(device, name) for name in facts} | {"torch": torch, "version": _CACHE_VERSION}


def _cached(key: dict[str, Any], make: Callable[[], tuple[Measurement, ...]]) -> tuple[Measurement, ...]:
    """The cached measurements, else new ones, which are cached unless empty. A damaged entry is replaced."""
    path = _cache_file(key)
    kept = _read(path)
    if kept is not None:
        return kept
    made = make()
    if path is not None and made:
        with suppress(Exception):  # a failed write only costs the next run some seconds
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps([asdict(item) for item in made]))
    return made


def _read(path: Path | None) -> tuple[Measurement, ...] | None:
    """The measurements in a file of the cache; None without one, or if it is damaged."""
    if path is None or not path.exists():
        return None
    from pydantic import TypeAdapter

    with suppress(OSError, ValueError):
        return TypeAdapter(tuple[Measurement, ...]).validate_json(path.read_bytes(), strict=True)
    return None


def _cache_file(key: dict[str, Any]) -> Path | None:
    folder = cache_folder()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return None if folder is None else folder / "measurements" / f"{digest}.json"
