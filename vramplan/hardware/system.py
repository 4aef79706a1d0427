"""The operating system: its name, and whether it is Windows or WSL."""

from __future__ import annotations

import platform

from vramplan.hardware.sysroot import read_text, system_path


def system_name() -> str:
    """The system and its release: `Linux 6.8.0-45-generic`, `WSL2 5.15.153.1`, `Windows 11`, `Darwin 24.1.0`."""
    release = _release() or platform.release()
    name = platform.system() or "unknown system"
    return f"{'WSL2' if is_wsl() else name} {release}".strip()


def is_windows() -> bool:
    """Whether this is native Windows."""
    return platform.system() == "Windows"


def is_wsl() -> bool:
    """Whether this is WSL, by "microsoft" in the kernel's name (FlashML-org/FreeToken#233)."""
    kernel = _release() or read_text(system_path("/proc/version")) or ""
    return platform.system() == "Linux" and "microsoft" in kernel.lower()


def _release() -> str | None:
    return read_text(system_path("/proc/sys/kernel/osrelease")) if platform.system() == "Linux" else None
