"""What operations make of shapes, kept: torch's meta kernels, many of them written in Python, are asked once for
arguments that are alike, which is most of the time of a simulation that cannot be played back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

# More than the operations of any pipeline that differ; a few hundred bytes each.
_MOST = 1 << 14
_PLAIN = (int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)

# The result of an operation by what it depends on: shape, strides and dtype of one tensor or of several.
_Made = tuple[torch.Size, tuple[int, ...], torch.dtype]
_known: dict[Any, _Made | tuple[type, tuple[_Made, ...]]] = {}


class _UnlikeError(Exception):
    """An argument that cannot be told from others."""


def inferred(func: Any, args: Any, kwargs: Any, shapes: Mapping[int, torch.Tensor], infer: Callable[[], Any]) -> Any:
    """Meta tensors of the operation's result, from `infer` where none of this kind is known yet.

    `shapes` has the meta tensor of every tensor of the arguments, by its id. What changes or returns an argument, or
    lies in its memory, is always inferred.
    """
    if func._schema.is_mutable or func.is_view or not shapes:
        return infer()
    try:
        key = func, _likeness(args, shapes), _likeness(kwargs, shapes)
    except _UnlikeError:
        return infer()
    found = _known.get(key)
    if found is None:
        results = infer()
        made = _described(results, shapes)
        if made is not None:
            if len(_known) >= _MOST:
                _known.clear()
            _known[key] = made
        return results
    if isinstance(found[0], type):
        nesting, several = found
        return nesting(_empty(item) for item in several)
    return _empty(found)


def _likeness(value: Any, shapes: Mapping[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        shape = shapes[id(value)]
        return shape.shape, shape.stride(), shape.dtype
    if isinstance(value, _PLAIN):
        return type(value), value  # True, 1 and 1.0 are equal, and make tensors of other dtypes
    if isinstance(value, tuple | list):
        return tuple(_likeness(item, shapes) for item in value)
    if isinstance(value, dict):
        return tuple((name, _likeness(item, shapes)) for name, item in value.items())
    raise _UnlikeError


def _described(results: Any, shapes: Mapping[int, torch.Tensor]) -> _Made | tuple[type, tuple[_Made, ...]] | None:
    """What was made, None where it is more than tensors of memory of their own."""
    if isinstance(results, torch.Tensor):
        return _fresh(results, shapes)
    if type(results) not in (tuple, list):
        return None
    found: list[_Made] = []
    for item in results:
        made = _fresh(item, shapes) if isinstance(item, torch.Tensor) else None
        if made is None:
            return None
        found.append(made)
    apart = len({item.untyped_storage()._cdata for item in results}) == len(found)
    return (type(results), tuple(found)) if found and apart else None


def _fresh(result: torch.Tensor, shapes: Mapping[int, torch.Tensor]) -> _Made | None:
    storage = result.untyped_storage()
    if any(shape.untyped_storage()._cdata == storage._cdata for shape in shapes.values()):
        return None
    made = result.shape, result.stride(), result.dtype
    return made if not result.storage_offset() and _empty(made).untyped_storage().nbytes() == storage.nbytes() else None


def _empty(made: _Made) -> torch.Tensor:
    shape, stride, dtype = made
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
