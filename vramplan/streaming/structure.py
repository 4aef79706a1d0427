"""The modules, tensors and compiled calls of a component as they were, to see if any came, went or was replaced."""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any

import torch

from vramplan.pipeline.compiled import COMPILED


class Structure:
    """The structure of a module at one time. It keeps all that it knows, so that nothing new has the same identity."""

    def __init__(self, module: torch.nn.Module) -> None:
        modules = list(module.modules())
        owned: list[dict[str, Any]] = [
            several for child in modules for several in (child._modules, child._parameters, child._buffers)
        ]
        self._owned = [several.values() for several in owned]
        self._attributes = [vars(child) for child in modules]
        self._known = self._contents()

    @property
    def changed(self) -> bool:
        """Whether it is another one now."""
        now = self._contents()
        return len(now) != len(self._known) or not all(map(operator.is_, now, self._known))

    def _contents(self) -> list[Any]:
        return [*chain.from_iterable(self._owned), *(own.get(COMPILED) for own in self._attributes)]
