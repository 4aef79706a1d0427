"""Deep copies of modules, which every simulation makes of a whole pipeline."""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import cache
from types import FunctionType, NoneType
from typing import Any

import torch

_OWN = {
    "__deepcopy__", "__reduce_ex__", "__reduce__", "__getnewargs_ex__", "__getnewargs__", "__slots__", "__new__",
}  # fmt: skip
_IMMUTABLE = {NoneType, bool, int, float, complex, str, bytes, type, FunctionType, torch.dtype, torch.device}


def copy_module(value: Any, memo: dict[int, Any]) -> Any:
    """What `copy.deepcopy(value, memo)` makes of a module, in about half of the time.

    Modules and the plain dicts and lists in them are copied here, all else by `copy.deepcopy` with the same memo.
    """
    kind: Any = type(value)
    if kind in _IMMUTABLE:
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    if kind is dict or kind is OrderedDict:
        made: Any = kind()
        memo[id(value)] = made
        for key, item in value.items():
            made[copy_module(key, memo)] = copy_module(item, memo)
        return made
    if kind is list:
        made = memo[id(value)] = []
        made += [copy_module(item, memo) for item in value]
        return made
    if not isinstance(value, torch.nn.Module) or _copied_its_own_way(kind):
        return copy.deepcopy(value, memo)
    made = memo[id(value)] = kind.__new__(kind)
    made.__setstate__({key: copy_module(item, memo) for key, item in value.__getstate__().items()})  # type: ignore[no-untyped-call]
    return made


@cache
def _copied_its_own_way(kind: type) -> bool:
    """Whether a class of modules, or one that it inherits from, has a way of its own to be copied."""
    return any(name in vars(base) for base in kind.__mro__ if base not in (object, torch.nn.Module) for name in _OWN)
