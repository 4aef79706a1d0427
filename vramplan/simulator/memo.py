"""Record module forwards and replay them: equal modules on equal shapes use the same memory in the same order.

Blocks, tiles and denoising steps repeat each other. The first forward of a kind is run and recorded, event by event;
later ones are replayed through the same ledger and allocator, without their operations. A forward that cannot be
compared is run: of a module with hooks inside, with arguments that it may change, or one that keeps memory or frees
memory allocated before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch.utils import _pytree as pytree

from vramplan.simulator.engine import Engine
from vramplan.simulator.ledger import AllocateEvent, Block, Cost, MoveEvent, Recorder
from vramplan.simulator.shapes import label_of, value_of
from vramplan.simulator.tensor import VALUE_LIMIT, SimTensor, make_tensor, storage_key, tensors_in
from vramplan.streaming.attach import APPLY, ATTACHED
from vramplan.streaming.hooks import After, Before, Marker, Other

# Attempts to record a forward: the first may fail because of state that it sets up once.
_MAX_TRIES = 2
# Methods that join tiles in VAEs of diffusers 0.42, in place and line by line: most operations of a tiled decode.
_BLENDS = ("blend_v", "blend_h", "blend_t")
# Attributes that are not part of a module's structure: those of `torch.nn.Module`, of hooks, and those wrapped here.
_NOT_STRUCTURE = frozenset(vars(torch.nn.Module())) | {
    "forward",
    "_old_forward",
    "_hf_hook",
    "_diffusers_hook",
    APPLY,
    ATTACHED,
    *_BLENDS,
}
_PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)
# Objects with at most this many attributes, attention processors say, are compared by these; larger ones by identity.
_MAX_ATTRIBUTES = 8


class _NotComparableError(Exception):
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    """One tensor that a forward returned: its layout, and the block or argument whose memory it uses.

    `block` is the number of a block that the forward allocated. Without one the tensor uses the memory of the argument
    at index `argument`, `offset` elements after the start of that; if `same`, it is that argument.
    """

    block: int | None
    argument: int | None
    same: bool
    storage: int
    storage_bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    label: torch.device
    value: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A forward that can be replayed: its ledger events, its costs by module, and its outputs."""

    events: Sequence[int | AllocateEvent | MoveEvent | None]
    costs: Mapping[str, Cost]
    operations: int
    outputs: Sequence[Any]
    nesting: Any

    def play(self, engine: Engine, given: Sequence[torch.Tensor]) -> Any:
        """Replay the forward on arguments with these tensors. Raises torch.OutOfMemoryError as the forward would."""
        ledger = engine.ledger
        base = ledger.module
        blocks: dict[int, Block] = {}
        ledger.modules.append(base)
        try:
            for event in self.events:
                if isinstance(event, int):
                    del blocks[event]
                elif event is None:
                    engine.kernels.hold_cublas(ledger)
                elif len(event) == 3:
                    ledger.count_transfer(*event)
                else:
                    number, size, place, kind, module, ledger.operation = event
                    ledger.modules[-1] = base + module
                    blocks[number] = Block(ledger, size, place, kind)
        finally:
            ledger.modules.pop()
        for module, cost in self.costs.items():
            ledger.count(base + module, cost)
        ledger.operations += self.operations
        storages: dict[int, torch.Tensor] = {}
        made = [self._rebuild(item, engine, given, blocks, storages) for item in self.outputs]
        return pytree.tree_unflatten(made, self.nesting)

    @staticmethod
    def _rebuild(
        item: Any,
        engine: Engine,
        given: Sequence[torch.Tensor],
        blocks: Mapping[int, Block],
        storages: dict[int, torch.Tensor],
    ) -> Any:
        if not isinstance(item, _Output):
            return item
        if item.argument is not None:
            source = given[item.argument]
            assert isinstance(source, SimTensor)
            if item.same:
                return source
            storage, block, offset = source.meta, source.block, int(source.meta.storage_offset()) + item.offset
        else:
            assert item.block is not None
            block, offset = blocks[item.block], item.offset
            if item.storage not in storages:
                storages[item.storage] = torch.empty(item.storage_bytes, dtype=torch.uint8, device="meta")
            storage = storages[item.storage]
        shape = torch.empty(0, dtype=item.dtype, device="meta")
        shape.set_(storage.untyped_storage(), offset, item.shape, item.stride)
        return make_tensor(engine, shape, item.label, block, None if item.value is None else item.value.clone())


@dataclass(slots=True)
class Memo:
    """The recordings shared by all simulations with the same kernels."""

    recordings: dict[Any, Recording] = field(default_factory=dict)
    tries: dict[Any, int] = field(default_factory=dict)
    structures: dict[Any, int] = field(default_factory=dict)

    def attach(self, modules: Mapping[str, torch.nn.Module], engine: Engine) -> None:
        """Record and replay the forwards and tile blending of these modules, given by qualified name.

        Modules without children are skipped."""
        for name, module in modules.items():
            if next(module.children(), None) is None:
                continue
            module.__dict__["forward"] = self._wrap_forward(name, module, engine)
            for method in _BLENDS:
                if hasattr(module, method):
                    module.__dict__[method] = self._wrap_blend(name, module, method, engine)

    def _wrap_forward(self, name: str, module: torch.nn.Module, engine: Engine) -> Callable[..., Any]:
        """Wrap the module's forward."""
        found: list[tuple[int | None, list[torch.nn.Module]]] = []

        def key(args: Any, kwargs: Any, done: bool) -> Any:
            if not found:  # at the first call, as offloading adds its hooks after this wrapper
                found.append((self._structure(module), list(module.modules())))
            structure, parts = found[0]
            return _key(self._structure(module) if done else structure, parts, args, kwargs)

        return self._wrap(name, module.forward, key, engine)

    def _wrap_blend(self, name: str, module: torch.nn.Module, method: str, engine: Engine) -> Callable[..., Any]:
        """Wrap a method that changes an argument; calls with known values are not replayed."""

        def key(args: Any, kwargs: Any, done: bool) -> Any:
            if any(value_of(tensor) is not None for tensor in tensors_in((args, kwargs))):
                return None
            return (type(module), method), _argument_key((args, kwargs), {})

        return self._wrap(name, getattr(module, method), key, engine)

    def _wrap(
        self, name: str, original: Callable[..., Any], key_of: Callable[[Any, Any, bool], Any], engine: Engine
    ) -> Callable[..., Any]:
        """Wrap a function: replay it if it is recorded under its key, else run it and record it.

        `key_of(args, kwargs, done)` gives the key, before and after the call; None if there is no key.
        """

        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if engine.ledger.module != name:
                return original(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                key = key_of(args, kwargs, False)
                recording = self.recordings.get(key)
                if recording is not None:
                    return recording.play(engine, list(tensors_in((args, kwargs))))
            if key is None:
                return original(*args, **kwargs)
            tried = self.tries[key] = self.tries.get(key, 0) + 1
            if tried > _MAX_TRIES:
                return original(*args, **kwargs)
            recorder = Recorder(name=name)
            made = _record(recorder, engine, original, args, kwargs)
            with torch._C.DisableTorchFunction():
                if not recorder.broken and key == key_of(args, kwargs, True):
                    self._keep(key, recorder, made, list(tensors_in((args, kwargs))))
            return made

        return call

    def _keep(self, key: Any, recorder: Recorder, made: Any, given: Sequence[torch.Tensor]) -> None:
        leaves, nesting = pytree.tree_flatten(made)
        outputs = _outputs(leaves, given, recorder)
        if outputs is not None:
            self.recordings[key] = Recording(
                events=recorder.events,
                costs=recorder.costs,
                operations=recorder.operations,
                outputs=outputs,
                nesting=nesting,
            )

    def _structure(self, module: torch.nn.Module) -> int | None:
        """A number shared by all modules of equal structure; None if part of the module cannot be replayed."""
        try:
            made = _signature(module, outermost=True)
        except _NotComparableError:
            return None
        return self.structures.setdefault(made, len(self.structures))


def _signature(module: torch.nn.Module, *, outermost: bool = False) -> Any:
    """The classes and attributes of a module and its submodules, without tensors."""
    own = vars(module)
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if any(not (outermost and isinstance(hook, Before | After | Marker | Other)) for hook in hooks):
        raise _NotComparableError
    if not outermost and ("_hf_hook" in own or "_diffusers_hook" in own):
        raise _NotComparableError
    plain = tuple((name, _attribute(value)) for name, value in own.items() if name not in _NOT_STRUCTURE)
    children = tuple((name, _signature(child)) for name, child in module.named_children())
    return type(module), plain, children


def _attribute(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, torch.Tensor):
        raise _NotComparableError
    if isinstance(value, tuple | list):
        return tuple(map(_attribute, value))
    made: Any = type(value).__new__
    if made is object.__new__ and hasattr(value, "__dict__"):  # its attributes are its whole state
        attributes = vars(value)
        if len(attributes) <= _MAX_ATTRIBUTES and all(isinstance(item, _PLAIN) for item in attributes.values()):
            return type(value), tuple(attributes.items())
    return _ByIdentity(value)


def _record(recorder: Recorder, engine: Engine, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run a forward while the recorder listens, and return its result."""
    ledger = engine.ledger
    before = ledger.operations
    ledger.recorders.append(recorder)
    try:
        made = original(*args, **kwargs)
    finally:
        ledger.recorders.remove(recorder)
    recorder.operations = ledger.operations - before
    return made


def _key(structure: int | None, parts: Sequence[torch.nn.Module], args: Any, kwargs: Any) -> Any:
    """The key of a forward: its structure, weights and arguments; None if they cannot be compared."""
    if structure is None:
        return None
    try:
        return structure, _weight_layouts(parts), _argument_key((args, kwargs), {})
    except _NotComparableError:
        return None


def _weight_layouts(parts: Sequence[torch.nn.Module]) -> Any:
    """The device, place and layout of every weight of a module."""
    found = []
    for part in parts:
        for tensors in (part._parameters, part._buffers):
            for tensor in tensors.values():
                if tensor is None:
                    continue
                if not isinstance(tensor, SimTensor):
                    raise _NotComparableError
                meta = tensor.meta
                known = None if tensor.stored is None else _ByIdentity(tensor.stored)
                found.append((tensor.label, tensor.block.place, meta.dtype, meta.shape, meta.stride(), known))
    return tuple(found)


def _argument_key(given: Any, seen: dict[int, tuple[int, int]]) -> Any:
    """The key of arguments: layouts, devices, known values, and which arguments share memory.

    The offset of an argument in its memory counts only relative to another argument in the same memory: the tiles of
    one latent have equal keys.

    Raises:
        _NotComparableError: an object, or a list that the module may change.
    """
    if isinstance(given, torch.Tensor):
        value = value_of(given)
        if value is not None and value.numel() > VALUE_LIMIT:
            raise _NotComparableError
        known = None if value is None else _digest(value)
        meta = given.meta if isinstance(given, SimTensor) else given
        offset, shared = int(meta.storage_offset()), None
        if isinstance(given, SimTensor):
            shared, first = seen.setdefault(id(given.block), (len(seen), offset))
            offset -= first
        return meta.shape, meta.stride(), offset, meta.dtype, label_of(given), shared, known
    if isinstance(given, _PLAIN):
        return type(given), given
    if type(given) is tuple:
        return tuple(_argument_key(item, seen) for item in given)
    if type(given) is dict:
        return tuple((name, _argument_key(item, seen)) for name, item in given.items())
    raise _NotComparableError


def _digest(value: torch.Tensor) -> bytes:
    plain = value.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
    return hashlib.blake2b(plain.numpy().data, digest_size=16).digest()


def _outputs(leaves: Sequence[Any], given: Sequence[torch.Tensor], recorder: Recorder) -> list[Any] | None:
    """The outputs of a forward, to be rebuilt; None if that is impossible, or if the forward keeps other memory."""
    blocks = {id(tensor.block): place for place, tensor in enumerate(given) if isinstance(tensor, SimTensor)}
    same = {id(tensor): place for place, tensor in enumerate(given)}
    found: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, SimTensor):
            if not isinstance(leaf, _PLAIN):
                return None
            found.append(leaf)
            continue
        block = recorder.alive.get(id(leaf.block))
        argument = same.get(id(leaf), blocks.get(id(leaf.block)))
        if block is None and argument is None:
            return None
        value = leaf.value
        within = None if argument is None else given[argument]
        start = int(within.meta.storage_offset()) if isinstance(within, SimTensor) else 0
        found.append(
            _Output(
                block=block,
                argument=argument,
                same=id(leaf) in same,
                storage=storage_key(leaf.meta),
                storage_bytes=leaf.meta.untyped_storage().nbytes(),
                shape=tuple(leaf.meta.shape),
                stride=leaf.meta.stride(),
                offset=int(leaf.meta.storage_offset()) - start,
                dtype=leaf.meta.dtype,
                label=leaf.label,
                value=None if value is None else value.clone(),
            )
        )
    left = {item.block for item in found if isinstance(item, _Output) and item.block is not None}
    return found if left == set(recorder.alive.values()) else None
