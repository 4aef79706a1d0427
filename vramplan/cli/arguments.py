"""Check arguments before anything that takes long is imported. What a check cannot tell cheaply is told later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vramplan.errors import UsageError
from vramplan.profiles.names import profile_path
from vramplan.units import check_amount

# Names of devices that are no profiles' are of these kinds, or have one of these beginnings.
_KINDS = ("cpu", "cuda", "rocm", "xpu", "mps")
_IDENTIFIERS = ("gpu-", "mig-")
_FILES = (".safetensors", ".gguf")


def check_device(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Refuse a name that is neither a profile's nor of the form of a device or file."""
    if value is not None and not Path(value).suffix and not _is_device(value.casefold()):
        profile_path("devices", value)
    return value


def _is_device(name: str) -> bool:
    return ":" in name or name in _KINDS or name.startswith(_IDENTIFIERS)


def check_size(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Refuse what is no amount of memory."""
    if value is not None:
        check_amount(value, name=str(option.name))
    return value


def check_model(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """Refuse a name that is no folder, no file, no repository and no profile."""
    for name in (value,) if isinstance(value, str) else value:
        if not (
            Path(name).exists() or "/" in name or name.startswith((".", "~", "hub:")) or Path(name).suffix in _FILES
        ):
            try:
                profile_path("pipelines", name)
            except UsageError as error:
                raise UsageError(f"{name}: no such folder, and {error}") from None
    return value


def check_folder(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Refuse a file in a folder that does not exist."""
    if value is not None and not Path(value).parent.is_dir():
        raise UsageError(f"--{option.name} {value}: its folder does not exist")
    return value
