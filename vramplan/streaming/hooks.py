"""The hooks by which modules ask for their weights. In copies of a module, pickled ones too, they do nothing."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vramplan.errors import VramplanError

if TYPE_CHECKING:
    import torch


class _Hook:
    """Base of hooks: copies of their module have one that does nothing."""

    __slots__ = ()

    def __deepcopy__(self, memo: Any) -> Any:
        return no_hook

    def __reduce__(self) -> Any:
        return make_no_hook, ()


class Before(_Hook):
    """A hook before the forward of a module of the stream, which brings a block of it to the device."""

    __slots__ = ("block", "outermost", "stream")

    def __init__(self, stream: Any, block: Any, *, outermost: bool = False) -> None:
        self.stream = stream
        self.block = block
        self.outermost = outermost

    def __call__(self, module: torch.nn.Module, given: Any) -> None:
        """Bring the block to the device."""
        self.stream.before(self)


class After(_Hook):
    """A hook after the forward of a module of the stream, also after one that failed."""

    __slots__ = ("before",)

    def __init__(self, before: Before) -> None:
        self.before = before

    def __call__(self, module: torch.nn.Module, given: Any, made: Any) -> None:
        """Note that the block does not run any more."""
        self.before.stream.after(self.before)


class Marker(_Hook):
    """A hook that calls a function with a value, before or after a forward."""

    __slots__ = ("function", "value")

    def __init__(self, function: Callable[[Any], None], value: Any) -> None:
        self.function = function
        self.value = value

    def __call__(self, *_: Any) -> None:
        """Call the function."""
        self.function(self.value)


class Around(_Hook):
    """In place of a module's compiled call: its block is brought before, by nothing that is compiled."""

    __slots__ = ("before", "compiled")

    def __init__(self, before: Before, compiled: Any) -> None:
        self.before = before
        self.compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what is compiled."""
        try:
            self.before.stream.before(self.before)
            return self.compiled(*args, **kwargs)
        finally:
            self.before.stream.after(self.before)


class Other(_Hook):
    """A hook before the forward of a component outside of the cache."""

    __slots__ = ("cache", "in_loop")

    def __init__(self, cache: Any, *, in_loop: bool) -> None:
        self.cache = cache
        self.in_loop = in_loop

    def __call__(self, module: torch.nn.Module, given: Any) -> None:
        """Take the blocks off the device that are not needed beside it."""
        self.cache.others_run(in_loop=self.in_loop)


def no_hook(*_: Any) -> None:
    """The hook of a copy: nothing."""


def make_no_hook() -> Callable[..., None]:
    """`no_hook`, for pickle."""
    return no_hook


class Guard:
    """In place of `Module._apply`, which `to`, `half` and the like go through: it changes weights, but moves none.

    Moving to the stream's own device is what the hooks do; to another one is refused before anything has moved.
    """

    __slots__ = ("device", "module")

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply the function, without a change of device."""

        def stay(tensor: torch.Tensor) -> Any:
            made = function(tensor)
            if made.device == tensor.device:
                return made
            if made.device != self.device:
                raise VramplanError(
                    f"the weights of {type(self.module).__name__} are streamed to {self.device} under a plan: undo it "
                    f"before moving them to {made.device}"
                )
            return tensor if made.dtype == tensor.dtype else made.to(tensor.device)

        return type(self.module)._apply(  # type: ignore[no-untyped-call]
            self.module, stay, *args, **kwargs
        )

    def __deepcopy__(self, memo: Any) -> Any:
        return types.MethodType(type(self.module)._apply, memo[id(self.module)])

    def __reduce__(self) -> Any:
        return getattr, (self.module, "_apply")
