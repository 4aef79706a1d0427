"""Put a component's weights into a cache by hooks on its modules, and take them out again."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from itertools import chain
from typing import Any

import torch

from vramplan.errors import VramplanError
from vramplan.pipeline.component import role_of
from vramplan.pipeline.direct_access import called_by_place
from vramplan.pipeline.geometry import module_bytes, units_of
from vramplan.pipeline.modules import modules_of, pipes_of
from vramplan.pipeline.own_class import give_class, plain_class, take_class
from vramplan.pipeline.types import Role
from vramplan.streaming import backend
from vramplan.streaming.cache import Cache, Member, refuse_training
from vramplan.streaming.calls import devices, methods
from vramplan.streaming.division import divide
from vramplan.streaming.tensors import Block, move

# The attributes that streaming leaves on modules.
ATTACHED, APPLY = "_vramplan_stream", "_apply"


def stream_weights(pipe: Any, device: str, **components: Mapping[str, int]) -> None:
    """Stream the weights of these components of a pipeline to the device, each with the options of `attach`.

    Raises:
        ValueError: a component has fewer blocks. VramplanError: it is streamed already.
    """
    for name, options in components.items():
        attach(pipe.components[name], name, device, **options)
    join(pipe)


def attach(
    module: torch.nn.Module, name: str, device: str, *, streamed: int = 0, keep: int = 0, locked: int = 0
) -> None:
    """Cache the module's weights on the device.

    `streamed` of its blocks are there only while they run, the first `keep` others always, the rest while the module's
    phase lasts; so are its weights outside of blocks, which are always there if `keep` is not 0. Masters of `locked`
    blocks are page-locked, those of streamed ones first.

    Raises:
        ValueError: fewer blocks than that. VramplanError: it is streamed already.
    """
    if ATTACHED in vars(module):
        raise VramplanError(f"{name}: its weights are streamed already")
    stream = Stream(module, name, torch.device(device), streamed=streamed, keep=keep, locked=locked)
    try:
        stream.attach()
    except BaseException:
        stream.detach()
        raise


def detach(module: torch.nn.Module) -> None:
    """Take the module's weights out of their cache. Kept ones stay on the device, all others are in host memory."""
    stream = stream_of(module)
    if stream is not None:
        stream.detach()


def stream_of(module: torch.nn.Module) -> Stream | None:
    """The stream of a module, None without one."""
    found: Stream | None = vars(module).get(ATTACHED)
    return found


@contextmanager
def _entered(module: torch.nn.Module) -> Iterator[None]:
    """Context manager around a method of a component that reads weights outside of blocks."""
    stream = stream_of(module)
    if stream is not None:
        stream.before(None, outermost=False)
    yield


def join(pipe: Any) -> None:
    """Let all streamed components of a pipeline share one cache, and its calls take turns."""
    streams = _streams(pipe)
    if not streams:
        return
    first = streams[0].cache
    for stream in streams[1:]:
        if stream.cache is not first:
            stream.move_to(first)
    for name, module in modules_of(pipe).items():
        if stream_of(module) is not None:
            first.unwatch(module)
        elif not runs_in_loop(name, module):
            first.watch(module, [module, *_entries(module, set())])
    for part in pipes_of(pipe):
        _own_call(part, streams[0].device)


def running(pipe: Any) -> AbstractContextManager[None]:
    """Context manager around a call of the pipeline: other calls wait, and afterwards every weight is its master."""
    streams = _streams(pipe)
    refreshed = [stream.refresh() for stream in streams]
    if any(refreshed):
        join(pipe)
    return streams[0].cache.call() if streams else nullcontext()


def _streams(pipe: Any) -> list[Stream]:
    found = (stream_of(module) for module in modules_of(pipe).values())
    return list({id(stream): stream for stream in found if stream is not None}.values())


def runs_in_loop(name: str, module: torch.nn.Module) -> bool:
    """Whether the component runs in every step of denoising."""
    return _role(name, module) in ("denoiser", "control")


def _role(name: str, module: torch.nn.Module) -> Role:
    cls = plain_class(module)
    return role_of(name, cls.__module__.split(".")[0], cls.__name__)


class Stream:
    """The attachment of one module to a cache: its hooks, and the numbers of its blocks."""

    def __init__(
        self, module: torch.nn.Module, name: str, device: torch.device, *, streamed: int, keep: int, locked: int
    ) -> None:
        self.module = module
        self.name = name
        self.device = device
        self.numbers = {"streamed": streamed, "keep": keep, "locked": locked}
        self.cache = Cache(backend.backend_for(device))
        self.member: Member | None = None
        self._handles: list[Any] = []
        self._guarded: list[torch.nn.Module] = []
        self._known: list[int] = []

    def attach(self) -> None:
        """Divide the module, move what is kept, page-lock what is to be, and set the hooks."""
        # a VAE is called by its methods, piece by piece in tiles: its weights come and go as a whole
        units = [] if _role(self.name, self.module) == "vae" else units_of(self.module)
        numbers = self.numbers
        division = divide([module_bytes(unit) for unit in units], streamed=numbers["streamed"], keep=numbers["keep"])
        own, outside = _split(self.module, units)
        self.module.__dict__[ATTACHED] = self
        kept = [tensor for place in division.kept for tensor in own[place]] + (outside if numbers["keep"] else [])
        for tensor in kept:
            move(tensor, self.device)
        blocks = {
            place: Block(f"{self.name}.{place}", own[place], units[place].modules())
            for place in sorted(division.by_need)
        }
        rest = None if numbers["keep"] else Block(self.name, outside, self.module.modules())
        self.member = Member(
            self.name,
            rest,
            list(blocks.values()),
            [blocks[place] for place in division.streamed],
            in_loop=runs_in_loop(self.name, self.module),
        )
        self.cache.members.append(self.member)
        if numbers["locked"]:  # the weights outside of blocks first: every forward needs them
            chosen = [blocks[place] for place in division.by_need[: numbers["locked"]]]
            self.cache.page_lock([*([rest] if rest is not None else []), *chosen], self.name)
        self._hook({id(units[place]): block for place, block in blocks.items()}, units)
        give_class(self.module, {**devices(self.module, self.device, stream_of), **methods(self.module, _entered)})
        self._known = _identities(self.module)

    def _hook(self, blocks: Mapping[int, Block], units: Sequence[torch.nn.Module]) -> None:
        assert self.member is not None
        self._on(self.module, partial(Before, self, None, outermost=True))
        for child in _entries(self.module, {id(unit) for unit in units}):
            block = blocks.get(id(child))
            self._on(child, partial(Before, self, block))
            if block is not None and block in self.member.streamed:
                self._handles.append(child.register_forward_hook(After(block)))
        for child in called_by_place(self.module):
            for unit in units:
                block = blocks.get(id(unit))
                if block is not None and any(child is inner for inner in unit.modules()):
                    self._on(child, partial(Before, self, block))
                    self._handles.append(child.register_forward_hook(After(block)))
        for block in self.member.blocks:
            self._guard(block)

    def _on(self, module: torch.nn.Module, make: Any) -> None:
        self._handles.append(module.register_forward_pre_hook(make()))

    def _guard(self, block: Block) -> None:
        """Let `to`, `half` and the like change masters, not copies on the device."""
        inside = {id(leaf.tensor) for leaf in block.leaves}
        for child in self.module.modules():
            own = chain(child._parameters.values(), child._buffers.values())
            if APPLY not in vars(child) and any(id(tensor) in inside for tensor in own):
                child.__dict__[APPLY] = Guard(child, self)
                self._guarded.append(child)

    def detach(self) -> None:
        """Take everything back that `attach` has set, as far as it came."""
        for handle in self._handles:
            handle.remove()
        for child in self._guarded:
            child.__dict__.pop(APPLY, None)
        self._handles, self._guarded = [], []
        if self.member is not None:
            self.cache.release(self.member)
        self.module.__dict__.pop(ATTACHED, None)
        take_class(self.module)

    def move_to(self, cache: Cache) -> None:
        """Take part in another cache from now on."""
        assert self.member is not None
        self.cache.drop_all()
        self.cache.leave(self.member)
        cache.members.append(self.member)
        cache.notes += self.cache.notes
        self.cache = cache

    def refresh(self) -> bool:
        """Attach again if tensors came, went or were replaced since, as an adapter does. Returns whether they did."""
        if _identities(self.module) == self._known:
            return False
        cache = self.cache
        self.detach()
        self.attach()
        self.move_to(cache)
        return True

    def before(self, block: Block | None, *, outermost: bool) -> None:
        """Bring what is about to run to the device."""
        assert self.member is not None
        if outermost:
            refuse_training(self.module)
            self.member.begin_forward()
        self.cache.need(self.member, block)
        if block is not None:
            block.active += 1

    def __deepcopy__(self, memo: Any) -> None:
        """None: copies of a module are not streamed."""

    def __reduce__(self) -> Any:
        """None as well, for pickle."""
        return type(None), ()


class Before:
    """A hook before the forward of a module. Copies of the module have one that does nothing."""

    __slots__ = ("block", "outermost", "stream")

    def __init__(self, stream: Stream, block: Block | None, *, outermost: bool = False) -> None:
        self.stream = stream
        self.block = block
        self.outermost = outermost

    def __call__(self, module: torch.nn.Module, given: Any) -> None:
        """Bring the block to the device."""
        self.stream.before(self.block, outermost=self.outermost)

    def __deepcopy__(self, memo: Any) -> Any:
        return no_hook

    def __reduce__(self) -> Any:
        return make_no_hook, ()


class After:
    """A hook after the forward of a streamed block, which may give way from then on."""

    __slots__ = ("block",)

    def __init__(self, block: Block) -> None:
        self.block = block

    def __call__(self, module: torch.nn.Module, given: Any, made: Any) -> None:
        """Note that the block does not run any more."""
        self.block.active = max(0, self.block.active - 1)

    def __deepcopy__(self, memo: Any) -> Any:
        return no_hook

    def __reduce__(self) -> Any:
        return make_no_hook, ()


def no_hook(*_: Any) -> None:
    """The hook of a copy: nothing."""


def make_no_hook() -> Callable[..., None]:
    """`no_hook`, for pickle."""
    return no_hook


class Guard:
    """In place of `Module._apply`: it changes the masters of the module's weights, and leaves them in host memory."""

    __slots__ = ("module", "stream")

    def __init__(self, module: torch.nn.Module, stream: Stream) -> None:
        self.module = module
        self.stream = stream

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply the function, without a change of device."""
        member = self.stream.member
        inside = {id(tensor) for tensor in chain(self.module._parameters.values(), self.module._buffers.values())}
        for block in member.blocks if member is not None else ():
            if any(id(leaf.tensor) in inside for leaf in block.leaves):
                self.stream.cache.take_off(block)

        def stay(tensor: torch.Tensor) -> Any:
            made = function(tensor)
            return made.to(tensor.device) if made.device != tensor.device else made

        made = type(self.module)._apply(  # type: ignore[no-untyped-call]
            self.module, stay, *args, **kwargs
        )
        self.stream._known = _identities(self.stream.module)
        return made

    def __deepcopy__(self, memo: Any) -> Any:
        return types.MethodType(type(self.module)._apply, memo[id(self.module)])

    def __reduce__(self) -> Any:
        return getattr, (self.module, APPLY)


def _own_call(pipe: Any, device: torch.device) -> None:
    """Let the pipeline's calls take turns, name the device as its own, and not be moved."""
    plain = plain_class(pipe)

    @wraps(plain.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with running(self):
            return plain.__call__(self, *args, **kwargs)

    @wraps(getattr(plain, "to", call))
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _streams(self) and any(isinstance(item, str | int | torch.device) for item in (*args, *kwargs.values())):
            raise VramplanError(
                "the weights of this pipeline are streamed under a plan: undo it before moving the pipeline"
            )
        return plain.to(self, *args, **kwargs)  # type: ignore[attr-defined]

    give_class(pipe, {"__call__": call, "to": to, **devices(pipe, device, _streams)})


def _split(
    module: torch.nn.Module, units: Iterable[torch.nn.Module]
) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """The tensors of each unit, and those outside of units. One that several share is outside."""
    per_unit = [{id(tensor): tensor for tensor in _tensors(unit)} for unit in units]
    inside = {id(child) for unit in units for child in unit.modules()}
    owners: dict[int, int] = {}
    for found in per_unit:
        for key in found:
            owners[key] = owners.get(key, 0) + 1
    outside: dict[int, torch.Tensor] = {}
    for child in module.modules():
        if id(child) not in inside:
            outside |= {
                id(tensor): tensor
                for tensor in chain(child._parameters.values(), child._buffers.values())
                if tensor is not None
            }
    outside |= {key: tensor for found in per_unit for key, tensor in found.items() if owners[key] > 1}
    return [[t for key, t in found.items() if key not in outside] for found in per_unit], list(outside.values())


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _entries(module: torch.nn.Module, units: set[int]) -> Iterator[torch.nn.Module]:
    """The units, and the outermost submodules without any: whatever runs weights of the module calls one of them."""
    for child in module.children():
        called = not isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict)
        if id(child) in units or (called and not any(id(inner) in units for inner in child.modules())):
            yield child
        else:
            yield from _entries(child, units)


def _identities(module: torch.nn.Module) -> list[int]:
    return [
        id(tensor) for child in module.modules() for tensor in (*child._parameters.values(), *child._buffers.values())
    ]
