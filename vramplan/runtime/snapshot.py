"""The state of a pipeline before a plan was applied, and the two ways back to it.

`Snapshot` is for an apply that fails: whatever point it reached, everything is restored by force, object by object,
without asking the strategies. `Before` is for undoing: hooks come off through the strategies, and what the user
did to the pipeline in the meantime stays.
"""

from __future__ import annotations

import signal
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from vramplan.pipeline.component import device_of
from vramplan.pipeline.modules import modules_of, pipes_of
from vramplan.strategies import DECODES, PLACEMENTS, REGISTRY, WEIGHTS
from vramplan.strategies.base import ON_PIPE, Execution, Placed
from vramplan.strategies.disk import bring_back
from vramplan.strategies.kernel_state import KernelState

if TYPE_CHECKING:
    import torch


def _left_by(*strategies: type[Any], on_pipe: bool = False) -> tuple[str, ...]:
    """The attributes that settings of these strategies leave on modules, or on the pipeline, as each says itself."""
    names = {name: None for cls in strategies for name in getattr(cls, "leaves", ())}
    return tuple(name.removeprefix(ON_PIPE) for name in names if name.startswith(ON_PIPE) == on_pipe)


_PIPE_ATTRIBUTES = _left_by(*REGISTRY, on_pipe=True)
_HOOK_ATTRIBUTES = _left_by(*WEIGHTS, *PLACEMENTS)
_DECODE_ATTRIBUTES = _left_by(*DECODES)
_ABSENT = object()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the block is done: a pipeline must not be left half restored."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # no other thread gets signals; a handler that is not Python's raises nothing
        return
    pressed: list[Any] = []
    signal.signal(signal.SIGINT, lambda *given: pressed.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            before(*pressed[0])


# ---- by force


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything of a pipeline that applying may change. It holds weights, so it must not outlive the apply."""

    modules: Mapping[str, Any]
    owners: Sequence[_Owner]
    devices: Sequence[tuple[Any, Any]]
    originals: Sequence[tuple[Any, Any]]

    @classmethod
    def of(cls, pipe: Any, rounded: Collection[str] = ()) -> Snapshot:
        """The pipeline as it is. Of the components that are to be `rounded` the weights are kept, in RAM."""
        modules = modules_of(pipe)
        children = {id(child): child for module in modules.values() for child in module.modules()}.values()
        tensors = [tensor for child in children for tensor in _own_tensors(child)]
        kept = [t for name in rounded for child in modules[name].modules() for t in _own_tensors(child)]
        return cls(
            modules=modules,
            owners=[_Owner.of(thing) for thing in _owners(pipe, children)],
            devices=[(tensor, tensor.device) for tensor in tensors],
            originals=[(tensor, tensor.data.cpu()) for tensor in kept],
        )

    def put_back(self) -> None:
        """The very objects from before, each weight on its device with its value.

        Raises:
            OSError: weights that had been written to files cannot be read. They stay there, and the hooks stay on.
        """
        from vramplan.streaming.tensors import move

        for module in self.modules.values():
            bring_back(module)
        for owner in self.owners:
            owner.put_back()
        for tensor, data in self.originals:
            if tensor.dtype != data.dtype:
                tensor.data = data
        for tensor, device in self.devices:
            move(tensor, device)


@dataclass(frozen=True, slots=True)
class _Owner:
    """An object, its class and attributes, and what its dictionaries and lists contained."""

    thing: Any
    cls: type
    attributes: Mapping[str, Any]
    contents: Mapping[str, Any]

    @classmethod
    def of(cls, thing: Any) -> _Owner:
        own = dict(vars(thing))
        return cls(thing, type(thing), own, {name: value.copy() for name, value in own.items() if _is_container(value)})

    def put_back(self) -> None:
        """The same class, the same attributes, the same containers, the same contents."""
        if type(self.thing) is not self.cls:
            self.thing.__class__ = self.cls
        for name, content in self.contents.items():
            container = self.attributes[name]
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        own = vars(self.thing)
        for name in own.keys() - self.attributes.keys():
            del own[name]
        own.update(self.attributes)


def _is_container(value: Any) -> bool:
    return type(value) in (dict, OrderedDict, list, set)


def _owners(pipe: Any, children: Iterable[Any]) -> Iterator[Any]:
    """The pipeline and those it is put together of, its modules, and registries of hooks that are on these already."""
    yield from pipes_of(pipe)
    for child in children:
        yield child
        registry = vars(child).get("_diffusers_hook")
        if registry is not None:
            yield registry
            yield from registry._fn_refs
        if hasattr(vars(child).get("processor"), "_attention_backend"):
            yield child.processor


# ---- by the strategies


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """The state that undo restores. It does not keep a component alive that the pipeline has dropped since."""

    modules: WeakValueDictionary[str, Any]
    devices: Mapping[str, str]
    children: WeakKeyDictionary[Any, _Child]
    settings: Mapping[str, Mapping[str, Any]]
    attributes: Sequence[tuple[Any, Mapping[str, Any]]]

    @classmethod
    def of(cls, pipe: Any, rounded: Collection[str] = (), devices: Mapping[str, str] | None = None) -> Before:
        """The pipeline as it is; of the components that are to be `rounded`, nothing holds on to the weights.

        `devices` are for a pipeline that was placed while it was loaded: where each component would be without that.
        """
        modules = modules_of(pipe)
        kept = [module for name, module in modules.items() if name not in rounded]
        children = [child for module in kept for child in module.modules()]
        return cls(
            modules=WeakValueDictionary(modules),
            devices=devices or {name: device_of(module) or "cpu" for name, module in modules.items()},
            children=WeakKeyDictionary({child: _Child.of(child, placed=devices is not None) for child in children}),
            settings={name: decode_settings(module) for name, module in modules.items()},
            attributes=[
                (part, {name: vars(part).get(name, _ABSENT) for name in _PIPE_ATTRIBUTES}) for part in pipes_of(pipe)
            ],
        )

    def restore(self, pipe: Any, placed: Placed) -> None:
        """Hooks off, weights where they were. What fails half way can be called again, and ends the same.

        A component that was taken out or replaced since then is left as it is.
        """
        here = modules_of(pipe)
        kept: dict[str, Any] = {name: module for name, module in self.modules.items() if here.get(name) is module}
        for setting, names in placed:
            if not isinstance(setting, Execution):
                setting.remove(pipe, [name for name in names if name in kept])
        kernels = {name for setting, names in placed if isinstance(setting, Execution) for name in names}
        for name, module in kept.items():
            self._restore_weights(name, module)
            if name in kernels:
                self._restore_kernels(module)
            vars(module).update(self.settings[name])
        for part, attributes in self.attributes:
            for name, value in attributes.items():
                _set(vars(part), name, value)

    def _restore_weights(self, name: str, module: torch.nn.Module) -> None:
        from vramplan.streaming.tensors import move

        known = {child: self.children[child] for child in module.modules() if child in self.children}
        for child, before in known.items():
            before.restore(child)
        for child in module.modules():
            devices = known[child].devices if child in known else {}
            for own, tensor in _named_tensors(child):
                if tensor is not None:  # what came later, such as a LoRA's, goes where most of the component was
                    move(tensor, devices.get(own, self.devices[name]))

    def _restore_kernels(self, module: torch.nn.Module) -> None:
        for child in module.modules():
            if child in self.children:
                self.children[child].kernels.restore(child)


@dataclass(frozen=True, slots=True)
class _Child:
    """One module: its tensors, where each was, and what hooks would change."""

    tensors: Mapping[str, Any]
    devices: Mapping[str, Any]
    hooks: Mapping[str, Any]
    kernels: KernelState

    @classmethod
    def of(cls, child: torch.nn.Module, *, placed: bool = False) -> _Child:
        """The module as it is; one that was `placed` while it was loaded had no hooks before, and no device to keep."""
        named = {name: tensor for name, tensor in _named_tensors(child) if tensor is not None}
        return cls(
            named,
            {} if placed else {name: tensor.device for name, tensor in named.items()},
            {name: _ABSENT if placed else vars(child).get(name, _ABSENT) for name in _HOOK_ATTRIBUTES},
            KernelState.of(child),
        )

    def restore(self, child: torch.nn.Module) -> None:
        """The tensors that were, and no trace of hooks, unless somebody has set others since."""
        for name, before in self.tensors.items():
            _tie_again(child._buffers if name in child._buffers else child._parameters, name, before)
        registry = vars(child).get("_diffusers_hook")
        if registry is None or not registry.hooks:
            for name, value in self.hooks.items():
                _set(vars(child), name, value)


def _tie_again(named: dict[str, Any], name: str, before: Any) -> None:
    """The very tensor from before, where a new one stands for the same memory, or for none.

    accelerate 1.15 makes a new Parameter for each name when its hooks are set, and when they are taken off: tied ones
    are tied no more.
    """
    now = named.get(name)
    if now is not None and now is not before and (now.is_meta or now.data_ptr() == before.data_ptr()):
        named[name] = before


def _named_tensors(child: torch.nn.Module) -> list[tuple[str, Any]]:
    return [*child._parameters.items(), *child._buffers.items()]


def _own_tensors(child: torch.nn.Module) -> list[torch.Tensor]:
    return [tensor for _, tensor in _named_tensors(child) if tensor is not None]


def _set(owner: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        owner.pop(name, None)
    else:
        owner[name] = value


def decode_settings(module: Any) -> dict[str, Any]:
    """The plain attributes of a module that slicing, tiling and frame-wise decoding change."""
    return {name: value for name, value in vars(module).items() if name.startswith(_DECODE_ATTRIBUTES)}
