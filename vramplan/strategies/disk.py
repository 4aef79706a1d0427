"""Directories for weights that are offloaded to disk, and the way back.

diffusers never overwrites an existing file (0.42, `ModuleGroup._offload_to_disk`), even one of another model: each
component of each process gets its own directory, which is removed with the component.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import secrets
import shutil
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.errors import VramplanError
from vramplan.hardware.host import DISK_LEFT_FREE, offload_folder
from vramplan.units import format_bytes

if TYPE_CHECKING:
    import torch


# Prefix of the directories; the host name follows, as containers that share a disk have their own process ids.
_PREFIX = "vramplan-"


@contextmanager
def own_folder(module: torch.nn.Module, name: str) -> Iterator[Path]:
    """Make a directory for the weights of the module, until the module or the process ends.

    If the block fails, weights in files are read back, and the directory is removed at once.

    Raises:
        VramplanError: the directory cannot be written, or the disk has too little room for the weights.
    """
    from safetensors import SafetensorError

    from vramplan.pipeline.geometry import module_bytes

    parent = offload_folder()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        written = module_bytes(module)
        free, needed = shutil.disk_usage(parent).free, written + DISK_LEFT_FREE
        if free < needed:
            raise VramplanError(
                f"{parent}: {format_bytes(free)} free on the disk, {format_bytes(needed)} needed to offload {name}; "
                "set VRAMPLAN_OFFLOAD to a folder with more room"
            )
    except OSError as error:
        raise VramplanError(f"{parent}: weights cannot be offloaded there: {error.strerror or error}") from error
    folder = parent / f"{_PREFIX}{platform.node()}-{os.getpid()}-{name}-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
        weakref.finalize(module, shutil.rmtree, folder, True)
        yield folder
        _return_with_hooks(module)
    except BaseException as error:
        bring_back(module, _unhooked_groups(folder))
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or error
            raise VramplanError(f"{parent}: {name} cannot be offloaded there: {reason}") from error
        raise


def bring_back(module: torch.nn.Module, unhooked: Iterable[Any] = ()) -> None:
    """Read the weights of every group from its file to the CPU, and remove the files.

    A tensor of two groups is read from the inner one's file: it is empty when the outer one's is written. `unhooked`
    are groups that no hook of the module refers to.
    """
    # a group that was interrupted while it was created has no file
    groups = [group for group in (*unhooked, *_hooked_groups(module)) if hasattr(group, "safetensors_file_path")]
    for group in groups:
        _read(group)
    for folder in {Path(group.safetensors_file_path).parent for group in groups}:
        shutil.rmtree(folder, ignore_errors=True)


def _read(group: Any) -> None:
    """Read the group's weights to the CPU. The file stays, for a retry if this fails."""
    from safetensors.torch import load_file

    if group._is_offloaded_to_disk and Path(group.safetensors_file_path).exists():  # false once they are back
        stored = load_file(group.safetensors_file_path, device="cpu")
        for key, tensor in group.key_to_tensor.items():
            tensor.data = stored[key].clone()  # copy from the mapped file, with the usual alignment


def _return_with_hooks(module: torch.nn.Module) -> None:
    """Return the weights when a hook is removed: diffusers does so to load a LoRA, and would lose them (0.42)."""
    for group in _hooked_groups(module):
        for child in group.modules if group.offload_leader in group.modules else [group.offload_leader]:
            hook = child._diffusers_hook.get_hook("group_offloading")
            hook.deinitalize_hook = partial(_return_weights, group)


def _return_weights(group: Any, child: torch.nn.Module) -> torch.nn.Module:
    _read(group)
    Path(group.safetensors_file_path).unlink(missing_ok=True)
    return child


def _hooked_groups(module: torch.nn.Module) -> Iterator[Any]:
    """Yield the groups with files that the module's hooks hold, each once."""
    for child in module.modules():
        registry = getattr(child, "_diffusers_hook", None)
        hook = registry.get_hook("group_offloading") if registry is not None else None
        if hook is not None and hook.group.offload_to_disk_path and hook.group.offload_leader is child:
            yield hook.group


def _unhooked_groups(folder: Path) -> list[Any]:
    """Return the groups with files in the folder whose hook is not registered yet; the traceback keeps them alive.

    A group empties its weights before its hook is registered (diffusers 0.42, `GroupOffloadingHook.initialize_hook`):
    in between the module has no reference to the file. A group that was interrupted may lack the attribute.
    """
    from diffusers.hooks.group_offloading import ModuleGroup

    groups = (found for found in gc.get_objects() if type(found) is ModuleGroup)
    return [group for group in groups if getattr(group, "offload_to_disk_path", None) == str(folder)]


def _remove_abandoned(parent: Path) -> None:
    """Remove directories of ended processes of this machine only: the folder may hold other files."""
    import psutil

    pattern = re.compile(rf"{_PREFIX}{re.escape(platform.node())}-(\d+)-\w+-[0-9a-f]{{8}}")
    for folder in parent.iterdir():
        found = pattern.fullmatch(folder.name)
        if found is not None and not psutil.pid_exists(int(found[1])):
            shutil.rmtree(folder, ignore_errors=True)
