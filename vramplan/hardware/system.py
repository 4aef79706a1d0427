"""Which system this is."""

from __future__ import annotations

import platform

from vramplan.hardware.sysroot import at, read


def system_name() -> str:
    """`Linux 6.8.0-45-generic`, `WSL2 5.15.153.1`, `Windows 11`, `Darwin 24.1.0`."""
    release = _release() or platform.release()
    name = platform.system() or "unknown system"
    return f"{'WSL2' if is_wsl() else name} {release}".strip()


def is_windows() -> bool:
    """Whether this is Windows itself."""
    return platform.system() == "Windows"


def is_wsl() -> bool:
    """Whether this is Linux inside Windows, whose kernels carry the name (FlashML-org/FreeToken#233)."""
    return platform.system() == "Linux" and "microsoft" in (_release() or read(at("/proc/version")) or "").lower()


def _release() -> str | None:
    return read(at("/proc/sys/kernel/osrelease")) if platform.system() == "Linux" else None
