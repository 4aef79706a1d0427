"""Measure a module's weights: in total, by dtype, and by the pieces that offloading moves.

Only shapes and dtypes are read, of live modules and of modules on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vramplan.pipeline.quantization import extra_bytes, inner_tensors
from vramplan.pipeline.types import Geometry

if TYPE_CHECKING:
    import torch

# Pieces above this share of their module are split further if possible: SDXL's UNet has half of its weights in one of
# six blocks.
_LARGEST_UNIT = 1 / 16


def tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """Every parameter and buffer, each tied tensor once.

    In one pass over the modules: most of the time that describing a live pipeline takes is spent here.
    """
    parameters: dict[int, torch.Tensor] = {}
    buffers: dict[int, torch.Tensor] = {}
    for child in module.modules():
        for found, own in ((parameters, child._parameters), (buffers, child._buffers)):
            for tensor in own.values():
                if tensor is not None:
                    found.setdefault(id(tensor), tensor)
    return list((parameters | buffers).values())


def tensor_bytes(tensor: torch.Tensor) -> int:
    """The bytes of a tensor; for a quantized one, those of its inner tensors and its scales."""
    inner = inner_tensors(tensor)
    if inner:
        return sum(map(tensor_bytes, inner))
    return tensor.numel() * tensor.element_size() + extra_bytes(tensor)


def module_bytes(module: torch.nn.Module) -> int:
    """The bytes of a module's parameters and buffers, each tied tensor once."""
    return sum(map(tensor_bytes, tensors_of(module)))


def bytes_by_dtype(module: torch.nn.Module) -> dict[str, int]:
    """The bytes of a module's tensors by dtype name (`bfloat16`), largest first."""
    totals: dict[str, int] = {}
    for tensor in tensors_of(module):
        name = str(tensor.dtype).removeprefix("torch.")
        totals[name] = totals.get(name, 0) + tensor_bytes(tensor)
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def power_of_two(count: int) -> int:
    """The smallest power of two that holds `count` bytes; 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0


def block_modules_of(module: torch.nn.Module) -> tuple[str, ...]:
    """The submodule names that lead to a module's `ModuleList` of blocks; empty when it is a direct child.

    Block-level group offloading looks at direct children only (diffusers 0.42,
    `_apply_group_offloading_block_level`): the blocks of a T5 encoder stand one level deeper and are
    found only with `block_modules=["encoder"]`.
    """
    if getattr(module, "_group_offload_block_modules", None):
        return ()  # diffusers reads this declaration of its own classes
    path: list[str] = []
    current = module
    while not any(_is_list(child) and len(list(child.parameters())) > 0 for child in current.children()):
        heaviest = max(current.named_children(), key=lambda item: module_bytes(item[1]), default=None)
        if heaviest is None or module_bytes(heaviest[1]) * 2 < module_bytes(module):
            return ()
        path.append(heaviest[0])
        current = heaviest[1]
    return tuple(path)


def measure(module: torch.nn.Module) -> Geometry:
    """Measure the module's blocks, leaves and units, and the page-locked copies of them, in bytes."""
    names = block_modules_of(module)
    looked_into = frozenset(getattr(module, "_group_offload_block_modules", None) or names)
    lists = [tuple(map(module_bytes, blocks)) for blocks in _block_lists(module, looked_into)]
    total = module_bytes(module)
    return Geometry(
        block_lists=tuple(lists),
        block_modules=names if lists else (),
        rest_bytes=max(0, total - sum(map(sum, lists))),
        largest_leaf_bytes=_leaf_with_parents_bytes(module),
        leaf_count=sum(_own_bytes(child) > 0 for child in module.modules()),
        pinned_bytes=_pinned_bytes(module),
        units=tuple(map(module_bytes, units := units_of(module))),
        pinned_units=tuple(map(_pinned_bytes, units)),
    )


def units_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The pieces that partial residency streams, in order of definition: blocks, or the parts of large ones."""
    return list(_units(module, module_bytes(module) * _LARGEST_UNIT))


def _units(module: torch.nn.Module, limit: float) -> Iterable[torch.nn.Module]:
    for child in module.children():
        if _is_list(child):
            for item in _list_items(child):
                finer = list(_units(item, limit)) if module_bytes(item) > limit else []
                yield from finer or [item]
        elif module_bytes(child) > limit:
            yield from _units(child, limit)


def _list_items(blocks: torch.nn.Module) -> Iterable[torch.nn.Module]:
    """The modules in a list, including those in nested lists, as nested lists are never called."""
    import torch

    for item in blocks.children():
        if isinstance(item, torch.nn.ModuleList):
            yield from _list_items(item)
        else:
            yield item


def _pinned_bytes(module: torch.nn.Module) -> int:
    pieces = (piece for tensor in tensors_of(module) for piece in inner_tensors(tensor) or [tensor])
    return sum(power_of_two(tensor_bytes(piece)) for piece in pieces)


def _block_lists(module: torch.nn.Module, names: frozenset[str]) -> Iterable[list[torch.nn.Module]]:
    for name, child in module.named_children():
        if name in names:
            yield from _block_lists(child, names)
        elif _is_list(child) and module_bytes(child):
            yield list(child.children())


def _is_list(module: torch.nn.Module) -> bool:
    import torch

    return isinstance(module, torch.nn.ModuleList | torch.nn.Sequential)


def _own_bytes(module: torch.nn.Module) -> int:
    """The bytes of a module's own tensors, without submodules: one group of leaf-level offloading."""
    own = (*module._parameters.values(), *module._buffers.values())
    return sum(tensor_bytes(tensor) for tensor in own if tensor is not None)


def _leaf_with_parents_bytes(module: torch.nn.Module) -> int:
    """The most bytes on the device while one leaf runs: the leaf's, and the own tensors of every module around it.

    The latter stay for the whole forward of their module: CogVideoX-2b's patch embedding holds a table of positions
    four times the size of its largest layer.
    """
    return _own_bytes(module) + max(map(_leaf_with_parents_bytes, module.children()), default=0)
