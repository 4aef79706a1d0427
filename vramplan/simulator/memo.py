"""Record module forwards and replay them: equal modules on equal shapes use the same memory in the same order.

Blocks, tiles and denoising steps repeat each other. The first forward of a kind is run and recorded, event by event;
later ones are replayed through the same ledger and allocator, without their operations. A forward that cannot be
compared is run: of a module with hooks inside, with arguments that it may change, or one that keeps memory or frees
memory allocated before it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch.utils import _pytree as pytree

from vramplan.simulator.engine import Engine
from vramplan.simulator.forward_key import (
    BLENDS,
    PLAIN,
    NotComparableError,
    argument_key,
    forward_key,
    lists_in,
    signature,
    without_lists,
)
from vramplan.simulator.ledger import AllocateEvent, Block, Cost, MoveEvent, Recorder
from vramplan.simulator.shapes import value_of
from vramplan.simulator.tensor import SimTensor, make_tensor, storage_key, tensors_in

# Attempts to record a forward: the first may fail because of state that it sets up once.
_MAX_TRIES = 2


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

    def play(self, engine: Engine, args: Any, kwargs: Any) -> Any:
        """Replay the forward on these arguments. Raises torch.OutOfMemoryError as the forward would."""
        given: list[torch.Tensor | None] = list(tensors_in((args, kwargs)))
        lists = lists_in(args, kwargs)
        ledger = engine.ledger
        base = ledger.module
        blocks: dict[int, Block] = {}
        ledger.modules.append(base)
        try:
            for event in self.events:
                if isinstance(event, int):
                    if event >= 0:
                        del blocks[event]
                    else:
                        _release(-1 - event, given, lists)
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
        result, contents = pytree.tree_unflatten(made, self.nesting)
        for several, content in zip(lists, contents, strict=True):
            several[:] = content
        return result

    @staticmethod
    def _rebuild(
        item: Any,
        engine: Engine,
        given: Sequence[torch.Tensor | None],
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


@dataclass(frozen=True, slots=True)
class _Given:
    """The tensors of arguments before a forward, without keeping those in lists alive, which it may replace.

    By their ids: the index and a weak reference of each, and the index of its block. `offsets` are where they begin.
    """

    tensors: Mapping[int, tuple[int, Any]]
    blocks: Mapping[int, int]
    in_lists: Mapping[int, int]
    offsets: Sequence[int]

    @classmethod
    def of(cls, args: Any, kwargs: Any) -> _Given:
        """The tensors of these arguments."""
        listed = {id(tensor) for several in lists_in(args, kwargs) for tensor in tensors_in(several)}
        tensors: dict[int, tuple[int, Any]] = {}
        blocks: dict[int, int] = {}
        in_lists: dict[int, int] = {}
        offsets: list[int] = []
        for index, tensor in enumerate(tensors_in((args, kwargs))):
            tensors.setdefault(id(tensor), (index, weakref.ref(tensor)))
            offsets.append(int(tensor.meta.storage_offset()) if isinstance(tensor, SimTensor) else 0)
            if isinstance(tensor, SimTensor):
                blocks.setdefault(id(tensor.block), index)
                if id(tensor) in listed:
                    in_lists.setdefault(id(tensor.block), index)
        return cls(tensors, blocks, in_lists, offsets)


def _release(index: int, given: list[torch.Tensor | None], lists: Sequence[list[Any]]) -> None:
    """Take an argument out of the lists, and all that share its memory: the forward has freed it."""
    freed = given[index]
    assert isinstance(freed, SimTensor)
    block = freed.block
    del freed

    def goes(tensor: Any) -> bool:
        return isinstance(tensor, SimTensor) and tensor.block is block

    for several in (given, *lists):
        several[:] = [None if goes(item) else item for item in several]


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
            for method in BLENDS:
                if hasattr(module, method):
                    module.__dict__[method] = self._wrap_blend(name, module, method, engine)

    def _wrap_forward(self, name: str, module: torch.nn.Module, engine: Engine) -> Callable[..., Any]:
        """Wrap the module's forward."""
        found: list[tuple[int | None, list[torch.nn.Module]]] = []

        def key(args: Any, kwargs: Any, done: bool) -> Any:
            if not found:  # at the first call, as offloading adds its hooks after this wrapper
                found.append((self._structure(module), list(module.modules())))
            structure, parts = found[0]
            return forward_key(self._structure(module) if done else structure, parts, args, kwargs)

        return self._wrap(name, module.forward, key, engine)

    def _wrap_blend(self, name: str, module: torch.nn.Module, method: str, engine: Engine) -> Callable[..., Any]:
        """Wrap a method that changes an argument; calls with known values are not replayed."""

        def key(args: Any, kwargs: Any, done: bool) -> Any:
            if any(value_of(tensor) is not None for tensor in tensors_in((args, kwargs))):
                return None
            return (type(module), method), argument_key((args, kwargs), {})

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
                    return recording.play(engine, args, kwargs)
            if key is None:
                return original(*args, **kwargs)
            tried = self.tries[key] = self.tries.get(key, 0) + 1
            if tried > _MAX_TRIES:
                return original(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                before = _Given.of(args, kwargs)
            recorder = Recorder(name=name, releasable=dict(before.in_lists))
            made = _record(recorder, engine, original, args, kwargs)
            with torch._C.DisableTorchFunction():
                after = None if recorder.broken else key_of(args, kwargs, True)
                if after is not None and without_lists(key) == without_lists(after):
                    self._keep(key, recorder, (made, lists_in(args, kwargs)), before)
            return made

        return call

    def _keep(self, key: Any, recorder: Recorder, made: Any, given: _Given) -> None:
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
            made = signature(module, outermost=True)
        except NotComparableError:
            return None
        return self.structures.setdefault(made, len(self.structures))


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


def _outputs(leaves: Sequence[Any], given: _Given, recorder: Recorder) -> list[Any] | None:
    """The outputs of a forward, to be rebuilt; None if that is impossible, or if the forward keeps other memory."""
    found: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, SimTensor):
            if not isinstance(leaf, PLAIN):
                return None
            found.append(leaf)
            continue
        block = recorder.alive.get(id(leaf.block))
        place, reference = given.tensors.get(id(leaf), (None, None))
        same = reference is not None and reference() is leaf
        argument = place if same else None if block is not None else given.blocks.get(id(leaf.block))
        if block is None and argument is None:
            return None
        value = leaf.value
        start = 0 if argument is None else given.offsets[argument]
        found.append(
            _Output(
                block=block,
                argument=argument,
                same=same,
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
