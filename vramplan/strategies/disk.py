"""Where weights go that are offloaded to disk, and how they come back.

diffusers never writes a file anew that is there already (0.42, `ModuleGroup._offload_to_disk`), whatever model
left it: each component of each process gets a directory of its own, which goes with the component.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vramplan.errors import VramplanError
from vramplan.hardware.budget import DISK_LEFT_FREE
from vramplan.hardware.host import offload_folder
from vramplan.units import format_bytes

if TYPE_CHECKING:
    import torch


@contextmanager
def own_folder(module: torch.nn.Module, name: str) -> Iterator[Path]:
    """A new directory for the module's weights, removed when the module goes or the process ends.

    Where the block fails, what is in files already comes back, and the directory goes at once.

    Raises:
        VramplanError: it cannot be made, or there is too little room for the weights.
    """
    from vramplan.pipeline.geometry import module_bytes

    parent = offload_folder()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        free, needed = shutil.disk_usage(parent).free, module_bytes(module) + DISK_LEFT_FREE
        if free < needed:
            raise VramplanError(
                f"{parent}: {format_bytes(free)} free on the disk, {format_bytes(needed)} needed to offload {name}; "
                "set VRAMPLAN_OFFLOAD to a folder with more room"
            )
        folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-{name}-", dir=parent))
    except OSError as error:
        raise VramplanError(f"{parent}: weights cannot be offloaded there: {error.strerror or error}") from error
    remove = weakref.finalize(module, shutil.rmtree, folder, True)
    try:
        yield folder
    except BaseException:
        bring_back(module)
        remove()
        raise


def bring_back(module: torch.nn.Module) -> None:
    """Read every group's weights from its file to the CPU, and remove the files.

    A tensor that two groups hold is taken from the inner one's file, which is written first: the outer one is
    written once the tensor is empty.
    """
    from safetensors.torch import load_file

    folders = set()
    for child in module.modules():
        registry = getattr(child, "_diffusers_hook", None)
        hook = registry.get_hook("group_offloading") if registry is not None else None
        path = getattr(hook.group, "safetensors_file_path", None) if hook is not None else None
        if hook is None or path is None:
            continue
        folders.add(Path(path).parent)
        here = hook.group._is_offloaded_to_disk and hook.group.offload_leader is child
        if here and Path(path).exists():  # not, where they have come back already
            stored = load_file(path, device="cpu")
            for key, tensor in hook.group.key_to_tensor.items():
                tensor.data = stored[key].clone()  # out of the file's mapping, aligned as it was
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove what processes that are gone have left."""
    import psutil

    for folder in parent.iterdir():
        owner = folder.name.partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
