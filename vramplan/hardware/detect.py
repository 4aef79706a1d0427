"""Detect the machine: the host, then one probe per vendor. Needs no torch, opens no device context."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vramplan.hardware import amd, apple, intel, nvidia
from vramplan.hardware.host import host_notes, read_host
from vramplan.hardware.torch_devices import torch_is_built_for
from vramplan.hardware.types import Accelerator, Hardware, Host

# A probe yields accelerators, and notes as text on what it could not read. A new vendor is one more entry.
Probe = Callable[[Host], Iterator[Accelerator | str]]
PROBES: tuple[Probe, ...] = (nvidia.probe, amd.probe, intel.probe, apple.probe)


def detect() -> Hardware:
    """Detect this machine as it is now. Missing hardware is no error; failed readings are in the notes."""
    host = read_host()
    found = list(_keep_one_vendor([item for probe in PROBES for item in _run_probe(probe, host)]))
    accelerators = tuple(item for item in found if isinstance(item, Accelerator))
    nodes = frozenset(device.memory_node for device in accelerators if device.memory_node is not None)
    host = read_host(nodes) if nodes else host
    return Hardware(
        accelerators=accelerators,
        host=host,
        notes=(*(item for item in found if isinstance(item, str)), *host_notes(host)),
    )


def _run_probe(probe: Probe, host: Host) -> Iterator[Accelerator | str]:
    """Run the probe; if it fails, keep its results so far and add a note with the reason."""
    try:
        yield from probe(host)
    except Exception as error:  # one vendor's broken driver must not hide the others
        vendor = probe.__module__.rpartition(".")[2]
        yield f"{vendor}: could not be read ({type(error).__name__}: {error})"


def _keep_one_vendor(found: list[Accelerator | str]) -> Iterator[Accelerator | str]:
    """Keep, of NVIDIA's and AMD's devices, those of the vendor that the installed torch is built for.

    A torch is built for one of the two, and both would be `cuda:0`. Without a torch NVIDIA's are kept.
    """
    kinds = {item.kind for item in found if isinstance(item, Accelerator)}
    if not kinds.issuperset(("cuda", "rocm")):
        yield from found
        return
    vendor, dropped = ("AMD", "cuda") if torch_is_built_for("hip") else ("NVIDIA", "rocm")
    for item in found:
        if isinstance(item, Accelerator) and item.kind == dropped:
            yield f"{item.name} is left out: a torch uses the cards of one vendor, and here those are {vendor}'s"
        else:
            yield item
