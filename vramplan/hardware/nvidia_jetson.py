"""Jetson boards, whose systems before JetPack 7 have no NVML, read from the device tree."""

from __future__ import annotations

from vramplan.hardware.nvidia_facts import native_dtypes
from vramplan.hardware.sysroot import read_text, system_path
from vramplan.hardware.types import Accelerator, Host, Reading

# The compute capability of the chip in each board (https://developer.nvidia.com/cuda-gpus, Jetson products).
_CAPABILITIES = {
    "nvidia,tegra210": (5, 3),
    "nvidia,tegra186": (6, 2),
    "nvidia,tegra194": (7, 2),
    "nvidia,tegra234": (8, 7),
    "nvidia,tegra264": (11, 0),
}


def jetson(host: Host) -> Accelerator | None:
    """Detect the GPU of a Jetson, which shares the host's memory; None on other machines."""
    chips = (read_text(system_path("/proc/device-tree/compatible")) or "").split("\0")
    if not any(chip.startswith("nvidia,tegra") for chip in chips):
        return None
    capability = next((_CAPABILITIES[chip] for chip in chips if chip in _CAPABILITIES), None)
    model = (read_text(system_path("/proc/device-tree/model")) or "NVIDIA Jetson").strip("\0")
    return Accelerator(
        kind="cuda",
        index=0,
        name=model,
        total_bytes=host.total_bytes,
        free_bytes=host.available_bytes,
        unified=True,
        architecture=None if capability is None else "sm_{}{}".format(*capability),
        native=native_dtypes(capability),
        free_readings=(Reading(source="available on the host", free_bytes=host.available_bytes),),
        free_reason="the memory is the host's",
    )
