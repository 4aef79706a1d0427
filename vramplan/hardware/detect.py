"""Read the machine: the host, then one probe per vendor. Needs no torch, opens no device context."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vramplan.hardware import amd, apple, intel, nvidia
from vramplan.hardware.host import host_notes, read_host
from vramplan.hardware.torch_answers import torch_is_built_for
from vramplan.hardware.types import Accelerator, Hardware, Host

# A probe gives the accelerators it found and, as text, what it could not read. A new vendor is one more name.
Probe = Callable[[Host], Iterator[Accelerator | str]]
PROBES: tuple[Probe, ...] = (nvidia.probe, amd.probe, intel.probe, apple.probe)


def detect() -> Hardware:
    """What this machine has now. Missing hardware is no error; what could not be read is in the notes."""
    host = read_host()
    found = list(_of_one_torch([item for probe in PROBES for item in _survive(probe, host)]))
    accelerators = tuple(item for item in found if isinstance(item, Accelerator))
    nodes = frozenset(device.memory_node for device in accelerators if device.memory_node is not None)
    host = read_host(nodes) if nodes else host
    return Hardware(
        accelerators=accelerators,
        host=host,
        notes=(*(item for item in found if isinstance(item, str)), *host_notes(host)),
    )


def _survive(probe: Probe, host: Host) -> Iterator[Accelerator | str]:
    """What the probe gives; if it fails, what it gave until then and a note with the reason."""
    try:
        yield from probe(host)
    except Exception as error:  # whatever is wrong with one vendor's driver, the others are still to be read
        vendor = probe.__module__.rpartition(".")[2]
        yield f"{vendor}: could not be read ({type(error).__name__}: {error})"


def _of_one_torch(found: list[Accelerator | str]) -> Iterator[Accelerator | str]:
    """What was found, of NVIDIA's and AMD's devices only those that the installed torch calls `cuda`.

    A torch is built for one of both, and both would be `cuda:0`. Without a torch NVIDIA's stay.
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
