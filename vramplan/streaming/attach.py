"""Put a component's weights into a cache by hooks on its modules, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch

from vramplan.errors import VramplanError
from vramplan.pipeline.compiled import COMPILED, compiled_call, streaming_refusal
from vramplan.pipeline.component import STREAMED, role_of
from vramplan.pipeline.direct_access import called_by_place
from vramplan.pipeline.geometry import module_bytes, tensors_of, units_of
from vramplan.pipeline.modules import modules_of, pipes_of
from vramplan.pipeline.own_class import give_class, plain_class, take_class
from vramplan.pipeline.types import Role
from vramplan.streaming import backend
from vramplan.streaming.cache import Cache
from vramplan.streaming.calls import devices, methods
from vramplan.streaming.division import Division, divide
from vramplan.streaming.hooks import After, Around, Before, Guard
from vramplan.streaming.locking import page_lock
from vramplan.streaming.member import Member
from vramplan.streaming.structure import Structure
from vramplan.streaming.tensors import Block, move

# The attributes that streaming leaves on modules.
ATTACHED, APPLY = STREAMED, "_apply"


def stream_weights(pipe: Any, device: str, **components: Mapping[str, int]) -> None:
    """Stream the weights of these components of a pipeline to the device, each with the options of `attach`.

    Components may be streamed one after another, before there is a pipeline of them: `pipe` is then any object that has
    them as attributes. A last call with the pipeline itself lets them share one cache.

    Raises:
        ValueError: a component has fewer blocks. VramplanError: it is streamed already.
    """
    assembled = hasattr(type(pipe), "components")
    for name, options in components.items():
        module = getattr(pipe, "components", {}).get(name)
        module = getattr(pipe, name) if module is None else module
        attach(module, name, device, **options)
    if assembled:
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
    if stream_of(module) is not None:
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
    if stream is None:
        yield
        return
    hook = Before(stream, None)
    stream.before(hook)
    try:
        yield
    finally:
        stream.after(hook)


def join(pipe: Any) -> None:
    """Let all streamed components of a pipeline share one cache, and its calls take turns."""
    streams = _streams(pipe)
    if not streams:
        return
    first = streams[0].cache
    for stream in streams:
        if stream.cache is not first:
            first.absorb(stream.cache)
    for name, module in modules_of(pipe).items():
        if stream_of(module) is not None:
            first.unwatch(module)
        else:
            first.watch(module, [module, *_entries(module, set())], in_loop=runs_in_loop(name, module))
    for part in pipes_of(pipe):
        _own_call(part, streams[0].device)


@contextmanager
def running(pipe: Any, *, exposed: bool = False) -> Iterator[None]:
    """Context manager around a call of the pipeline: other calls wait, and afterwards every weight is its master.

    In one that is `exposed` others may change weights between steps.
    """
    streams = _streams(pipe)
    if not streams:
        yield
        return
    with streams[0].cache.call(exposed=exposed):
        for stream in _streams(pipe):
            stream.refresh()
        yield


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
        self._around: list[tuple[torch.nn.Module, Around]] = []
        self._known: Structure | None = None
        self._division: Division | None = None

    def attach(self, known: Mapping[int, tuple[Any, int]] = MappingProxyType({})) -> None:
        """Divide the module, move what is kept, page-lock what is to be, and set the hooks. Weights at `known`
        addresses are page-locked already."""
        refusal = streaming_refusal(self.module)
        if refusal is not None:
            raise VramplanError(refusal)
        units = streamed_units(self.name, self.module)
        division = self._divide(units)
        own, outside = split_tensors(self.module, units)
        self.module.__dict__[ATTACHED] = self
        kept = [tensor for place in division.kept for tensor in own[place]] + (outside if self.numbers["keep"] else [])
        for tensor in kept:
            move(tensor, self.device)
        blocks = {
            place: Block(f"{self.name}.{place}", own[place], [units[place]]) for place in sorted(division.by_need)
        }
        rest = None if self.numbers["keep"] else Block(self.name, outside, [self.module])
        self.member = Member(
            self.name,
            rest,
            list(blocks.values()),
            [blocks[place] for place in division.streamed],
            in_loop=runs_in_loop(self.name, self.module),
            owner=self,
        )
        self.cache.members.append(self.member)
        if self.numbers["locked"]:  # the weights outside of blocks first: every forward needs them
            chosen = [blocks[place] for place in division.by_need[: self.numbers["locked"]]]
            waiting = [*([rest] if rest is not None else []), *chosen]
            note = page_lock(self.cache.backend, waiting, self.name, known)
            self.cache.notes += [note] if note else []
        self._hook(blocks, units)
        give_class(self.module, {**devices(self.module, self.device, stream_of), **methods(self.module, _entered)})
        self._known = Structure(self.module)

    def _divide(self, units: Sequence[torch.nn.Module]) -> Division:
        """The plan's division, also when adapters have changed sizes since."""
        if self._division is None:
            sizes = [module_bytes(unit) for unit in units]
            self._division = divide(sizes, streamed=self.numbers["streamed"], keep=self.numbers["keep"])
        return self._division

    def _hook(self, blocks: Mapping[int, Block], units: Sequence[torch.nn.Module]) -> None:
        for child, unit in hook_points(self.module, units):
            block = None if unit is None else blocks.get(unit)
            self._on(child, Before(self, block, outermost=child is self.module))
        for child in self.module.modules():
            if not isinstance(vars(child).get(APPLY), Guard):
                child.__dict__[APPLY] = Guard(child, self.device)
                self._guarded.append(child)

    def _on(self, module: torch.nn.Module, before: Before) -> None:
        compiled = compiled_call(module)
        if compiled is not None:  # it would compile hooks with the module
            around = Around(before, compiled)
            vars(module)[COMPILED] = around
            self._around.append((module, around))
            return
        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(After(before), always_call=True))

    def detach(self, *, unlock: bool = True) -> None:
        """Take everything back that `attach` has set, as far as it came."""
        for handle in self._handles:
            handle.remove()
        for child in self._guarded:
            child.__dict__.pop(APPLY, None)
        for child, around in reversed(self._around):
            if compiled_call(child) is around:
                vars(child)[COMPILED] = around.compiled
        self._handles, self._guarded, self._around = [], [], []
        if self.member is not None:
            self.cache.release(self.member, unlock=unlock)
        self.module.__dict__.pop(ATTACHED, None)
        take_class(self.module)

    def refresh(self) -> None:
        """Attach again if tensors came, went or were replaced since, as an adapter does, or blocks were compiled."""
        if self._known is not None and not self._known.changed:
            return
        assert self.member is not None
        known = {address: place for block in self.member.blocks for address, place in block.locked_places().items()}
        self.detach(unlock=False)
        self.attach(known)

    def before(self, hook: Before) -> None:
        """Bring what is about to run to the device."""
        assert self.member is not None
        if hook.outermost:
            _refuse_training(self.module)
            if self.cache.exposed:
                self.refresh()
            self.cache.begin(self.member)
        self.cache.need(self.member, hook.block)

    def after(self, hook: Before) -> None:
        """Let weights be masters again once nothing that needs them runs."""
        if self.member is not None:
            self.cache.done(self.member, hook.block)

    def __deepcopy__(self, memo: Any) -> None:
        """None: copies of a module are not streamed."""

    def __reduce__(self) -> Any:
        """None as well, for pickle."""
        return type(None), ()


def _own_call(pipe: Any, device: torch.device) -> None:
    """Let the pipeline's calls take turns, name the device as its own, and not be moved."""
    plain = plain_class(pipe)

    @wraps(plain.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with running(self, exposed=_calls_back(plain.__call__, self, *args, **kwargs)):
            return plain.__call__(self, *args, **kwargs)

    @wraps(getattr(plain, "to", call))
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _streams(self) and any(isinstance(item, str | int | torch.device) for item in (*args, *kwargs.values())):
            raise VramplanError(
                "the weights of this pipeline are streamed under a plan: undo it before moving the pipeline"
            )
        return plain.to(self, *args, **kwargs)  # type: ignore[attr-defined]

    give_class(pipe, {"__call__": call, "to": to, **devices(pipe, device, _streams)})


def _calls_back(function: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a callback is among the arguments of a call."""
    try:
        given = signature(function).bind_partial(*args, **kwargs).arguments
    except TypeError:  # the call itself will say so
        return False
    return any(callable(value) for name, value in {**given, **kwargs}.items() if name.startswith("callback"))


def streamed_units(name: str, module: torch.nn.Module) -> list[torch.nn.Module]:
    """The pieces that a component is streamed in. A VAE has none: its methods call it piece by piece, in tiles, so that
    its weights come and go as a whole."""
    return [] if _role(name, module) == "vae" else units_of(module)


def hook_points(
    module: torch.nn.Module, units: Sequence[torch.nn.Module]
) -> Iterator[tuple[torch.nn.Module, int | None]]:
    """The modules before whose forwards weights are brought: the component itself, its units, and what is outside of
    these. Each with the index of its unit, None outside of all."""
    yield module, None
    places = {id(unit): place for place, unit in enumerate(units)}
    for child in _entries(module, set(places)):
        yield child, places.get(id(child))
    for child in called_by_place(module):
        for place, unit in enumerate(units):
            if any(child is inner for inner in unit.modules()):
                yield child, place


def split_tensors(
    module: torch.nn.Module, units: Iterable[torch.nn.Module]
) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """The tensors of each unit, and those outside of units. One that several share is outside."""
    per_unit = [{id(tensor): tensor for tensor in tensors_of(unit)} for unit in units]
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


def _entries(module: torch.nn.Module, units: set[int]) -> Iterator[torch.nn.Module]:
    """The units, and the outermost submodules without any: whatever runs weights of the module calls one of them."""
    for child in module.children():
        called = not isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict)
        if id(child) in units or (called and not any(id(inner) in units for inner in child.modules())):
            yield child
        else:
            yield from _entries(child, units)


def _refuse_training(module: torch.nn.Module) -> None:
    """Raise VramplanError if the module is about to be trained: gradients need every weight to stay."""
    if module.training and torch.is_grad_enabled():
        raise VramplanError(
            f"{type(module).__name__} cannot be trained while its weights are streamed: undo the plan, or call eval()"
        )
