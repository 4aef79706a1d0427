"""Measure a module's weights: in all, by dtype, and by the pieces offloading moves.

Everything here reads shapes and dtypes only, so it serves a live module and one on the meta device alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vramplan.pipeline.quantized import extra_bytes, inner_tensors
from vramplan.pipeline.types import Geometry

if TYPE_CHECKING:
    import torch

# A piece to stream is at most about this share of its module, where it can be cut further: SDXL's UNet has half of
# its weights in one of six blocks.
_LARGEST_UNIT = 1 / 16


def tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """Every parameter and buffer, each tied tensor once; without `parameters()`, which joins names and is slow."""
    return _held_by(_modules_within(module))


def _held_by(modules: list[torch.nn.Module]) -> list[torch.Tensor]:
    """The tensors that these modules hold themselves."""
    kinds = ("_parameters", "_buffers")
    held = (tensor for kind in kinds for module in modules for tensor in getattr(module, kind).values())
    return list({id(tensor): tensor for tensor in held if tensor is not None}.values())


def _modules_within(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The module and all within it, in the order of `modules()`."""
    found: dict[int, torch.nn.Module] = {}
    left = [module]
    while left:
        one = left.pop()
        if id(one) not in found:
            found[id(one)] = one
            left += [child for child in reversed(one._modules.values()) if child is not None]
    return list(found.values())


def tensor_bytes(tensor: torch.Tensor) -> int:
    """The bytes a tensor holds; where it is quantized those of its inner tensors, and of the scales beside it."""
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
        return ()  # diffusers reads its own classes' declaration by itself
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
    """How the module can be cut into blocks and leaves, and what pinned copies of it would occupy."""
    names = block_modules_of(module)
    looked_into = frozenset(getattr(module, "_group_offload_block_modules", None) or names)
    lists = [tuple(map(module_bytes, blocks)) for blocks in _block_lists(module, looked_into)]
    total = module_bytes(module)
    return Geometry(
        block_lists=tuple(lists),
        block_modules=names if lists else (),
        rest_bytes=max(0, total - sum(map(sum, lists))),
        largest_leaf_bytes=_with_parents(module),
        leaf_count=sum(_own_bytes(child) > 0 for child in module.modules()),
        pinned_bytes=_pinned_bytes(module),
        units=tuple(map(module_bytes, units := units_of(module))),
        pinned_units=tuple(map(_pinned_bytes, units)),
    )


def units_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The pieces partial residency streams, in the order they are defined: blocks, or what large ones consist of."""
    return list(_units(module, module_bytes(module) * _LARGEST_UNIT))


def _units(module: torch.nn.Module, limit: float) -> Iterable[torch.nn.Module]:
    for child in module.children():
        if _is_list(child):
            for item in _items(child):
                finer = list(_units(item, limit)) if module_bytes(item) > limit else []
                yield from finer or [item]
        elif module_bytes(child) > limit:
            yield from _units(child, limit)


def _items(blocks: torch.nn.Module) -> Iterable[torch.nn.Module]:
    """What a list holds; what lists in it hold, as nothing calls those."""
    import torch

    for item in blocks.children():
        if isinstance(item, torch.nn.ModuleList):
            yield from _items(item)
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
    """What the module holds itself, its submodules left out: one group of leaf-level offloading."""
    return sum(map(tensor_bytes, _held_by([module])))


def _with_parents(module: torch.nn.Module) -> int:
    """The most there is while one leaf runs: the leaf, and what every module around it holds itself.

    Those stay for the whole forward of theirs: CogVideoX-2b's patch embedding holds a table of positions
    four times the size of its largest layer.
    """
    return _own_bytes(module) + max(map(_with_parents, module.children()), default=0)
