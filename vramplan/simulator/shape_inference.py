"""Infer the shapes of results with torch's meta kernels, and cache them by the layout of the arguments.

Many meta kernels are written in Python: they take most of the time of a simulation that cannot be replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

# More than the distinct operations of any pipeline; a few hundred bytes each.
_MAX_ENTRIES = 1 << 14
_PLAIN = (int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)

# The layout of one tensor (shape, strides, dtype), and the cached results by operation and arguments.
_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
_cache: dict[Any, _Layout | tuple[type, tuple[_Layout, ...]]] = {}


class _NotComparableError(Exception):
    """The arguments have a value that cannot be part of a cache key."""


def infer_results(
    func: Any, args: Any, kwargs: Any, shapes: Mapping[int, torch.Tensor], infer: Callable[[], Any]
) -> Any:
    """Return meta tensors of the operation's result, from the cache or from `infer`.

    `shapes` holds the meta tensor of every tensor in the arguments, by its id. An operation that changes or returns an
    argument, or shares its memory, is never cached.
    """
    if func._schema.is_mutable or func.is_view or not shapes:
        return infer()
    try:
        key = func, _key(args, shapes), _key(kwargs, shapes)
    except _NotComparableError:
        return infer()
    found = _cache.get(key)
    if found is None:
        results = infer()
        made = _layouts(results, shapes)
        if made is not None:
            if len(_cache) >= _MAX_ENTRIES:
                _cache.clear()
            _cache[key] = made
        return results
    if isinstance(found[0], type):
        nesting, several = found
        return nesting(_empty(item) for item in several)
    return _empty(found)


def _key(value: Any, shapes: Mapping[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        shape = shapes[id(value)]
        return shape.shape, shape.stride(), shape.dtype
    if isinstance(value, _PLAIN):
        return type(value), value  # True, 1 and 1.0 are equal, and make tensors of other dtypes
    if isinstance(value, tuple | list):
        return tuple(_key(item, shapes) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item, shapes)) for name, item in value.items())
    raise _NotComparableError


def _layouts(results: Any, shapes: Mapping[int, torch.Tensor]) -> _Layout | tuple[type, tuple[_Layout, ...]] | None:
    """The layouts of the results, None unless all are tensors with memory of their own."""
    if isinstance(results, torch.Tensor):
        return _own_layout(results, shapes)
    if type(results) not in (tuple, list):
        return None
    found: list[_Layout] = []
    for item in results:
        made = _own_layout(item, shapes) if isinstance(item, torch.Tensor) else None
        if made is None:
            return None
        found.append(made)
    separate = len({item.untyped_storage()._cdata for item in results}) == len(found)
    return (type(results), tuple(found)) if found and separate else None


def _own_layout(result: torch.Tensor, shapes: Mapping[int, torch.Tensor]) -> _Layout | None:
    storage = result.untyped_storage()
    if any(shape.untyped_storage()._cdata == storage._cdata for shape in shapes.values()):
        return None
    made = result.shape, result.stride(), result.dtype
    return made if not result.storage_offset() and _empty(made).untyped_storage().nbytes() == storage.nbytes() else None


def _empty(made: _Layout) -> torch.Tensor:
    shape, stride, dtype = made
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
