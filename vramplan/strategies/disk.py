"""Where weights go that are offloaded to disk, and how they come back.

diffusers never writes a file anew that is there already (0.42, `ModuleGroup._offload_to_disk`), whatever model
left it: each component of each process gets a directory of its own, which goes with the component.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import secrets
import shutil
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.errors import VramplanError
from vramplan.hardware.host import DISK_LEFT_FREE, offload_folder
from vramplan.units import format_bytes

if TYPE_CHECKING:
    import torch


# What the directories are called: containers that share a disk have each their own process numbers, and names.
_OURS = "vramplan-"


@contextmanager
def own_folder(module: torch.nn.Module, name: str, pieces: Sequence[torch.nn.Module] | None = None) -> Iterator[Path]:
    """A new directory for the module's weights, or those of `pieces` of it; removed when the module goes or the
    process ends.

    Where the block fails, what is in files already comes back, and the directory goes at once.

    Raises:
        VramplanError: it cannot be made or written, or there is too little room for the weights.
    """
    from safetensors import SafetensorError

    from vramplan.pipeline.geometry import module_bytes

    parent = offload_folder()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        written = sum(map(module_bytes, [module] if pieces is None else pieces))
        free, needed = shutil.disk_usage(parent).free, written + DISK_LEFT_FREE
        if free < needed:
            raise VramplanError(
                f"{parent}: {format_bytes(free)} free on the disk, {format_bytes(needed)} needed to offload {name}; "
                "set VRAMPLAN_OFFLOAD to a folder with more room"
            )
    except OSError as error:
        raise VramplanError(f"{parent}: weights cannot be offloaded there: {error.strerror or error}") from error
    folder = parent / f"{_OURS}{platform.node()}-{os.getpid()}-{name}-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
        weakref.finalize(module, shutil.rmtree, folder, True)
        yield folder
        _return_with_hooks(module)
    except BaseException as error:
        bring_back(module, _unhooked(folder))
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or error
            raise VramplanError(f"{parent}: {name} cannot be offloaded there: {reason}") from error
        raise


def bring_back(module: torch.nn.Module, unhooked: Iterable[Any] = ()) -> None:
    """Read every group's weights from its file to the CPU, and remove the files.

    A tensor that two groups hold is taken from the inner one's file, which is written first: the outer one is
    written once the tensor is empty. `unhooked` are groups no hook of the module leads to.
    """
    # one that was interrupted while it was made has no file yet
    groups = [group for group in (*unhooked, *_hooked(module)) if hasattr(group, "safetensors_file_path")]
    for group in groups:
        _read(group)
    for folder in {Path(group.safetensors_file_path).parent for group in groups}:
        shutil.rmtree(folder, ignore_errors=True)


def _read(group: Any) -> None:
    """The group's weights on the CPU. The file stays, for a second time if this one fails half way."""
    from safetensors.torch import load_file

    if group._is_offloaded_to_disk and Path(group.safetensors_file_path).exists():  # not, where they are back
        stored = load_file(group.safetensors_file_path, device="cpu")
        for key, tensor in group.key_to_tensor.items():
            tensor.data = stored[key].clone()  # out of the file's mapping, aligned as it was


def _return_with_hooks(module: torch.nn.Module) -> None:
    """Let whoever takes a hook off get the weights back: diffusers does, to load a LoRA, and would lose them (0.42)."""
    for group in _hooked(module):
        for child in group.modules if group.offload_leader in group.modules else [group.offload_leader]:
            hook = child._diffusers_hook.get_hook("group_offloading")
            hook.deinitalize_hook = partial(_returned, group)


def _returned(group: Any, child: torch.nn.Module) -> torch.nn.Module:
    _read(group)
    Path(group.safetensors_file_path).unlink(missing_ok=True)
    return child


def _hooked(module: torch.nn.Module) -> Iterator[Any]:
    """The groups with files that the module's hooks hold, each once."""
    for child in module.modules():
        registry = getattr(child, "_diffusers_hook", None)
        hook = registry.get_hook("group_offloading") if registry is not None else None
        if hook is not None and hook.group.offload_to_disk_path and hook.group.offload_leader is child:
            yield hook.group


def _unhooked(folder: Path) -> list[Any]:
    """The groups with files in the folder whose hook is not on yet; the traceback of the error keeps them alive.

    One that was interrupted while it was made has no file yet, and may not know of any.

    A group empties its weights before its hook is registered (diffusers 0.42, `GroupOffloadingHook.initialize_hook`):
    between the two nothing of the module's leads to the file.
    """
    from diffusers.hooks.group_offloading import ModuleGroup

    groups = (found for found in gc.get_objects() if type(found) is ModuleGroup)
    return [group for group in groups if getattr(group, "offload_to_disk_path", None) == str(folder)]


def _sweep(parent: Path) -> None:
    """Remove what processes of this machine that are gone have left, and nothing else: the folder may be anybody's."""
    import psutil

    ours = re.compile(rf"{_OURS}{re.escape(platform.node())}-(\d+)-\w+-[0-9a-f]{{8}}")
    for folder in parent.iterdir():
        found = ours.fullmatch(folder.name)
        if found is not None and not psutil.pid_exists(int(found[1])):
            shutil.rmtree(folder, ignore_errors=True)
