"""Modules copied as `copy.deepcopy` copies them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from make_pipeline import build

from vramplan.pipeline.modules import modules_of
from vramplan.simulator.module_copy import copy_module


def facts(module: torch.nn.Module) -> Any:
    """Classes and attributes; tensors by their value, and which of them are one and the same."""
    numbers: dict[int, int] = {}

    def fact(value: Any) -> Any:
        if isinstance(value, torch.nn.Module):
            return type(value), [(key, fact(item)) for key, item in vars(value).items()]
        if isinstance(value, torch.Tensor):
            number = numbers.setdefault(id(value), len(numbers))
            return type(value), number, value.dtype, value.requires_grad, value.detach().numpy().tobytes()
        if isinstance(value, dict):
            return type(value), [(key, fact(item)) for key, item in value.items()]
        if isinstance(value, list | tuple):
            return type(value), [fact(item) for item in value]
        return type(value), value if isinstance(value, int | float | str | None) else None

    return fact(module)


def objects(module: torch.nn.Module) -> set[int]:
    """What a copy must not share: modules, tensors and containers."""
    held = [item for child in module.modules() for item in vars(child).values() if isinstance(item, dict | list)]
    return {id(item) for item in (*module.modules(), *module.parameters(), *module.buffers(), *held)}


@pytest.mark.parametrize("kind", ["sd15-small", "flux-small"])
def test_a_copy_is_what_deepcopy_makes(kind: str) -> None:
    for module in modules_of(build(kind)).values():
        made = copy_module(module, {})
        assert facts(made) == facts(copy.deepcopy(module)) == facts(module)
        assert not objects(made) & objects(module)


def test_what_the_memo_holds_is_taken_and_tied_tensors_stay_tied() -> None:
    tied = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    other = torch.nn.Parameter(torch.zeros(4, 4))
    made = copy_module(tied, {id(tied[0].weight): other})
    assert made[0].weight is made[1].weight is other
    assert made[0].bias is not tied[0].bias


def test_a_module_that_copies_itself_does() -> None:
    class Own(torch.nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> str:
            return "its own copy"

    made = copy_module(torch.nn.ModuleDict({"plain": torch.nn.Linear(2, 2)}), {})
    assert isinstance(made["plain"], torch.nn.Linear)
    held = torch.nn.Module()
    held.__dict__["own"] = Own(2, 2)
    assert copy_module(held, {}).own == "its own copy"
