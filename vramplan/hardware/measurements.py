"""Measure a machine once, and cache the results by device and driver."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vramplan.common.files import cache_folder, write_text
from vramplan.hardware.disk import offload_folder
from vramplan.hardware.types import Accelerator, Hardware, Measurement


def measure_machine(hardware: Hardware, accelerator: Accelerator | None) -> Hardware:
    """Return the machine with measured speeds of the accelerator (of the CPU without one) and of the disk.

    Needs torch, and makes a device context in this process. Results for the same device, driver and torch come from
    the user's cache; a measurement that fails leaves a note.
    """
    notes: list[str] = []
    speeds = _cached(_cache_key(hardware, accelerator), lambda: tuple(_device_speed(accelerator, notes)))
    disk = () if hardware.host.disk_in_memory else tuple(_disk_speed(notes))
    if accelerator is None:
        host, accelerators = replace(hardware.host, measured=(*speeds, *disk)), hardware.accelerators
    else:
        host = replace(hardware.host, measured=disk)
        accelerators = tuple(
            replace(item, measured=speeds) if item.device == accelerator.device else item
            for item in hardware.accelerators
        )
    return replace(hardware, host=host, accelerators=accelerators, notes=(*hardware.notes, *notes))


def _device_speed(accelerator: Accelerator | None, notes: list[str]) -> Iterator[Measurement]:
    from vramplan.hardware import benchmark

    device = "cpu" if accelerator is None else accelerator.device
    native = accelerator.native if accelerator is not None else ("float32",)
    dtype = next((name for name in ("bfloat16", "float16") if name in native), "float32")
    pinned: tuple[benchmark.Direction, ...] = ("host_to_device_pinned",) if device != "cpu" else ()
    works: list[tuple[str, Callable[[], Measurement]]] = [
        (direction, lambda direction=direction: benchmark.measure_copy(device, direction))  # type: ignore[misc]
        for direction in (*pinned, "host_to_device_pageable", "device_to_host")
    ]
    works.append((f"the product in {dtype}", lambda: benchmark.measure_product(device, dtype)))
    for name, work in works:
        try:
            yield work()
        except Exception as error:  # torch built for another device, a full card, no page-locked memory
            reason = " ".join(str(error).split()) or type(error).__name__
            notes.append(f"{name.replace('_', ' ')} could not be measured on {device} ({reason})")


def _disk_speed(notes: list[str]) -> Iterator[Measurement]:
    from vramplan.hardware import benchmark

    folder = offload_folder()
    folder = next((path for path in (folder, *folder.parents) if path.is_dir()), folder)
    try:
        yield benchmark.measure_disk_read(folder)
    except OSError as error:
        notes.append(f"the disk could not be measured ({error.strerror or error})")


def _cache_key(hardware: Hardware, accelerator: Accelerator | None) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    device = accelerator or hardware.host
    # A card in another slot may have another link.
    card = ("uuid", "name", "driver", "link_bytes_per_s")
    facts = card if accelerator is not None else ("total_bytes", "cores", "system")
    torch = None
    with suppress(PackageNotFoundError):  # each measurement then fails with its own note
        torch = version("torch")
    return {name: getattr(device, name) for name in facts} | {"torch": torch}


def _cached(key: dict[str, Any], make: Callable[[], tuple[Measurement, ...]]) -> tuple[Measurement, ...]:
    """The cached measurements, else new ones, which are cached unless empty. A damaged entry is replaced."""
    from pydantic import TypeAdapter

    adapter = TypeAdapter(tuple[Measurement, ...])
    path = _cache_file(key)
    if path is not None:
        with suppress(OSError, ValueError):
            return adapter.validate_json(path.read_bytes(), strict=True)
    made = make()
    if path is not None and made:
        with suppress(Exception):  # a failed write only costs the next run some seconds
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps([asdict(item) for item in made]))
    return made


def _cache_file(key: dict[str, Any]) -> Path | None:
    folder = cache_folder()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return None if folder is None else folder / "measurements" / f"{digest}.json"
