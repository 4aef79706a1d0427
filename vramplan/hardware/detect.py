"""Read the machine: the host, then one probe per vendor. Needs no torch, opens no device context."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vramplan.hardware import amd, apple, nvidia
from vramplan.hardware.host import read_host
from vramplan.hardware.types import Accelerator, Hardware, Host

# A probe gives the accelerators it found and, as text, what it could not read. A new vendor is one more name.
Probe = Callable[[Host], Iterator[Accelerator | str]]
PROBES: tuple[Probe, ...] = (nvidia.probe, amd.probe, apple.probe)


def detect() -> Hardware:
    """What this machine has now. Missing hardware is no error; what could not be read is in the notes."""
    host = read_host()
    found = [item for probe in PROBES for item in _survive(probe, host)]
    return Hardware(
        accelerators=tuple(item for item in found if isinstance(item, Accelerator)),
        host=host,
        notes=tuple(item for item in found if isinstance(item, str)),
    )


def _survive(probe: Probe, host: Host) -> Iterator[Accelerator | str]:
    """What the probe gives; if it fails, what it gave until then and a note with the reason."""
    try:
        yield from probe(host)
    except Exception as error:  # whatever is wrong with one vendor's driver, the others are still to be read
        vendor = probe.__module__.rpartition(".")[2]
        yield f"{vendor}: could not be read ({type(error).__name__}: {error})"
