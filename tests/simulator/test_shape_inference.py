"""Shapes that torch was asked for once: they come out the same, and only for arguments that are alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vramplan.simulator import shape_inference as module
from vramplan.simulator.shape_inference import infer_results

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cache", {})


class Asked:
    """Runs operations through what is known, and counts how often torch was asked."""

    count = 0

    def __call__(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        shapes = {id(tensor): tensor for tensor in tensors_of(args)}

        def infer() -> Any:
            self.count += 1
            return func(*args, **kwargs)

        return infer_results(func, args, kwargs, shapes, infer)


def tensors_of(args: Any) -> Iterator[torch.Tensor]:
    for item in args:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, list | tuple):
            yield from tensors_of(item)


def facts(made: Any) -> Any:
    if isinstance(made, torch.Tensor):
        return made.shape, made.stride(), made.dtype, made.storage_offset(), made.untyped_storage().nbytes()
    return type(made), [facts(item) for item in made]


OPERATIONS = [
    (aten.mm.default, lambda: (meta(3, 4), meta(4, 5)), {}),
    (aten.addmm.default, lambda: (meta(5), meta(3, 4), meta(4, 5)), {}),
    (aten.cat.default, lambda: ([meta(2, 3), meta(4, 3)], 0), {}),
    (aten.native_layer_norm.default, lambda: (meta(2, 3, 8), [8], meta(8), meta(8), 1e-5), {}),
    (aten.native_group_norm.default, lambda: (meta(2, 8, 4, 4), meta(8), meta(8), 2, 8, 16, 4, 1e-5), {}),
    (
        aten.convolution.default,
        lambda: (meta(2, 3, 8, 8), meta(4, 3, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        {},
    ),
    (aten.mul.Tensor, lambda: (meta(2, 3).t(), meta(1, 2)), {}),
    (aten.mean.dim, lambda: (meta(2, 3), [1]), {"dtype": torch.float16}),
    (aten.clone.default, lambda: (meta(2, 3, 4, 4).to(memory_format=torch.channels_last),), {}),
]


@pytest.mark.parametrize(("func", "arguments", "options"), OPERATIONS, ids=[str(item[0]) for item in OPERATIONS])
def test_alike_is_asked_once_and_comes_out_the_same(func: Any, arguments: Any, options: dict[str, Any]) -> None:
    ask, plain = Asked(), facts(func(*arguments(), **options))
    found = [ask(func, *arguments(), **options) for _ in range(3)]
    assert [facts(made) for made in found] == [plain] * 3
    assert ask.count == 1
    assert len({id(made) for made in found}) == 3


@pytest.mark.parametrize(
    "unlike",
    [
        (meta(2, 3, dtype=torch.int64), True),
        (meta(2, 3, dtype=torch.int64), 1),
        (meta(2, 3, dtype=torch.int64), 1.0),
        (meta(2, 3, dtype=torch.int32), 1),
        (meta(3, 2, dtype=torch.int64), 1),
        (meta(3, 2, dtype=torch.int64).t(), 1),
    ],
)
def test_what_differs_in_anything_is_asked_for_itself(unlike: Any) -> None:
    ask = Asked()
    ask(aten.add.Scalar, meta(2, 3, dtype=torch.int64), 2)
    assert facts(ask(aten.add.Scalar, *unlike)) == facts(aten.add.Scalar(*unlike))
    assert ask.count == 2
    ask(aten.add.Scalar, *unlike)
    assert ask.count == 2


def test_what_lies_in_an_argument_is_always_asked() -> None:
    ask, given = Asked(), meta(4, 6)
    for _ in range(2):
        assert ask(aten.view.default, given, [24]).untyped_storage()._cdata == given.untyped_storage()._cdata
        assert ask(aten.add_.Tensor, given, meta(4, 6)) is given
        first, second = ask(aten.split.Tensor, given, 2)
        assert first.untyped_storage()._cdata == second.untyped_storage()._cdata == given.untyped_storage()._cdata
        assert ask(aten.contiguous.default, given) is given
    assert ask.count == 8


def test_there_is_an_end_to_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_ENTRIES", 3)
    ask = Asked()
    for size in range(1, 10):
        assert ask(aten.mm.default, meta(size, 4), meta(4, 5)).shape == (size, 5)
        assert len(module._cache) <= 3
