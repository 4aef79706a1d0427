"""The keys by which forwards are compared: the structure of a module, its weights, and its arguments."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from vramplan.simulator.shapes import label_of, value_of
from vramplan.simulator.tensor import VALUE_LIMIT, SimTensor
from vramplan.streaming.attach import APPLY, ATTACHED
from vramplan.streaming.hooks import After, Before, Marker, Other

# Methods that join tiles in VAEs of diffusers 0.42, in place and line by line: most operations of a tiled decode.
BLENDS = ("blend_v", "blend_h", "blend_t")
# Attributes that are not part of a module's structure: those of `torch.nn.Module`, of hooks, and those wrapped here.
_NOT_STRUCTURE = frozenset(vars(torch.nn.Module())) | {
    "forward",
    "_old_forward",
    "_hf_hook",
    "_diffusers_hook",
    APPLY,
    ATTACHED,
    *BLENDS,
}
PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)
# Objects with at most this many attributes, attention processors say, are compared by these; larger ones by identity.
_MAX_ATTRIBUTES = 8


# In the key of a forward: the place of a list among arguments, and of what is in lists.
_NO_LIST, _LISTS = "list", 3


class NotComparableError(Exception):
    """A value that cannot be compared with others, so that the forward cannot be replayed."""


class _ByIdentity:
    """An object compared by identity. The reference keeps it alive, so that its id stays unique."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def signature(module: torch.nn.Module, *, outermost: bool = False) -> Any:
    """The classes and attributes of a module and its submodules, without tensors."""
    own = vars(module)
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if any(not (outermost and isinstance(hook, Before | After | Marker | Other)) for hook in hooks):
        raise NotComparableError
    if not outermost and ("_hf_hook" in own or "_diffusers_hook" in own):
        raise NotComparableError
    plain = tuple((name, _attribute(value)) for name, value in own.items() if name not in _NOT_STRUCTURE)
    children = tuple((name, signature(child)) for name, child in module.named_children())
    return type(module), plain, children


def _attribute(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, torch.Tensor):
        raise NotComparableError
    if isinstance(value, tuple | list):
        return tuple(map(_attribute, value))
    made: Any = type(value).__new__
    if made is object.__new__ and hasattr(value, "__dict__"):  # its attributes are its whole state
        attributes = vars(value)
        if len(attributes) <= _MAX_ATTRIBUTES and all(isinstance(item, PLAIN) for item in attributes.values()):
            return type(value), tuple(attributes.items())
    return _ByIdentity(value)


def forward_key(structure: int | None, parts: Sequence[torch.nn.Module], args: Any, kwargs: Any) -> Any:
    """The key of a forward: its structure, weights and arguments; None if they cannot be compared."""
    if structure is None:
        return None
    seen: dict[int, tuple[int, int]] = {}
    try:
        # lists come last, as what is in them may be replaced
        plain = tuple(_NO_LIST if type(item) is list else argument_key(item, seen) for item in args)
        named = tuple(
            (name, _NO_LIST if type(item) is list else argument_key(item, seen)) for name, item in kwargs.items()
        )
        lists = tuple(tuple(argument_key(item, seen) for item in several) for several in lists_in(args, kwargs))
        return structure, _weight_layouts(parts), (plain, named), lists
    except NotComparableError:
        return None


def without_lists(key: Any) -> Any:
    """A key without what is in lists, and all of one that knows no lists."""
    return key[:_LISTS]


def _weight_layouts(parts: Sequence[torch.nn.Module]) -> Any:
    """The device, place and layout of every weight of a module."""
    found = []
    for part in parts:
        for tensors in (part._parameters, part._buffers):
            for tensor in tensors.values():
                if tensor is None:
                    continue
                if not isinstance(tensor, SimTensor):
                    raise NotComparableError
                meta = tensor.meta
                known = None if tensor.stored is None else _ByIdentity(tensor.stored)
                found.append((tensor.label, tensor.block.place, meta.dtype, meta.shape, meta.stride(), known))
    return tuple(found)


def argument_key(given: Any, seen: dict[int, tuple[int, int]]) -> Any:
    """The key of arguments: layouts, devices, known values, and which arguments share memory.

    The offset of an argument in its memory counts only relative to another argument in the same memory: the tiles of
    one latent have equal keys.

    Raises:
        NotComparableError: an object, or a list that the module may change.
    """
    if isinstance(given, torch.Tensor):
        value = value_of(given)
        if value is not None and value.numel() > VALUE_LIMIT:
            raise NotComparableError
        known = None if value is None else _digest(value)
        meta = given.meta if isinstance(given, SimTensor) else given
        offset, shared = int(meta.storage_offset()), None
        if isinstance(given, SimTensor):
            shared, first = seen.setdefault(id(given.block), (len(seen), offset))
            offset -= first
        return meta.shape, meta.stride(), offset, meta.dtype, label_of(given), shared, known
    if isinstance(given, PLAIN):
        return type(given), given
    if type(given) is tuple:
        return tuple(argument_key(item, seen) for item in given)
    if type(given) is dict:
        return tuple((name, argument_key(item, seen)) for name, item in given.items())
    raise NotComparableError


def _digest(value: torch.Tensor) -> bytes:
    plain = value.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
    return hashlib.blake2b(plain.numpy().data, digest_size=16).digest()


def lists_in(args: Any, kwargs: Any) -> list[list[Any]]:
    """The lists among arguments."""
    return [item for item in (*args, *kwargs.values()) if type(item) is list]
