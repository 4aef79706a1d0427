"""How a streamed component or its pipeline is asked for its device, and called other than by its forward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch

from vramplan.pipeline.direct_access import reading_methods
from vramplan.pipeline.own_class import plain_class

# The last is a method, of pipelines that look where their weights are (diffusers 0.42: Cosmos 3).
_DEVICES = ("device", "_execution_device", "_get_execution_device")
# A VAE is called by these, which may read weights before any submodule runs.
_METHODS = ("encode", "decode")


def devices(thing: Any, device: torch.device, streamed: Callable[[Any], object]) -> dict[str, Any]:
    """Properties and methods that name the device which the thing runs on, for as long as it is `streamed`."""

    def here(plain: Any) -> Any:
        if isinstance(plain, property):
            return property(lambda self: device if streamed(self) else plain.__get__(self))
        return wraps(plain)(lambda self: device if streamed(self) else plain(self))

    cls = plain_class(thing)
    return {name: here(getattr(cls, name)) for name in _DEVICES if hasattr(cls, name)}


def methods(module: torch.nn.Module, entered: Callable[[Any], AbstractContextManager[None]]) -> dict[str, Any]:
    """The methods beside its forward by which a component reads its weights, each inside the context of `entered`."""

    def inside(plain: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(plain)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            with entered(self):
                return plain(self, *args, **kwargs)

        return method

    cls = plain_class(module)
    names = [*(name for name in _METHODS if callable(getattr(cls, name, None))), *reading_methods(module)]
    return {name: inside(getattr(cls, name)) for name in names}
