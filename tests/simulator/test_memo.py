"""Forwards that are played back: when, and that the books come out the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from vramplan.simulator.allocator import CachingAllocator
from vramplan.simulator.engine import Engine
from vramplan.simulator.kernels import Kernels
from vramplan.simulator.ledger import Ledger
from vramplan.simulator.memo import Memo
from vramplan.simulator.parts import simulated_copy
from vramplan.simulator.run import simulated_devices
from vramplan.units import MIB

SIZE = 1024


class Block(nn.Module):
    """One layer between two more operations; counts how often it really runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE)
        self.act = nn.GELU()
        self.seen: Any = None

    runs = 0

    def forward(self, given: Any, *more: Any) -> Any:
        type(self).runs += 1
        return self.act(self.layer(given)) + 1


class Views(Block):
    """Two parts of one tensor, and the argument itself."""

    def forward(self, given: Any, *more: Any) -> Any:
        first, second = super().forward(given).chunk(2, dim=-1)
        return first, {"second": second, "view": given[:3], "same": given, "number": 3}


class Keeps(Block):
    """Keeps a tensor from one forward to the next."""

    def forward(self, given: Any, *more: Any) -> Any:
        self.seen = super().forward(given)
        return self.seen + 1


class Counts(Block):
    """Counts its forwards in an attribute."""

    def forward(self, given: Any, *more: Any) -> Any:
        self.seen = (self.seen or 0) + 1
        return super().forward(given)


class Joins(Block):
    """Joins its halves line by line in place, as VAEs do with tiles; keeps a list, so that its forward is run."""

    joined = 0

    def forward(self, given: Any, *more: Any) -> Any:
        self.seen = [*(self.seen or []), 1]
        made = super().forward(given)
        return self.blend_v(made[:256], made[256:], 8)

    def blend_v(self, above: Any, below: Any, extent: int) -> Any:
        type(self).joined += 1
        for line in range(extent):
            below[line] = above[-extent + line] * (1 - line / extent) + below[line] * (line / extent)
        return below


class World:
    """Two modules of a kind on a simulated device."""

    def __init__(self, kind: type[Block], engine: Engine, memo: Memo | None) -> None:
        self.engine = engine
        self.modules = {name: simulated_copy(kind(), self.engine).to("cuda") for name in ("one", "two")}
        if memo is not None:
            names = {f"{name}.{n}" if n else name: m for name, r in self.modules.items() for n, m in r.named_modules()}
            memo.attach(names, self.engine)

    def call(self, name: str, *args: Any) -> Any:
        self.engine.ledger.modules.append(name)
        try:
            return self.modules[name](*args)
        finally:
            self.engine.ledger.modules.pop()

    def books(self) -> Any:
        ledger = self.engine.ledger
        return (
            ledger.allocator.peak_allocated_bytes,
            ledger.allocator.peak_reserved_bytes,
            ledger.allocator.allocated_bytes,
            ledger.operations,
            ledger.module_costs,
            ledger.costs,
            ledger.peaks,
            ledger.moved_bytes,
        )


@contextmanager
def world_of(kind: type[Block], memo: Memo | None, capacity_bytes: int | None = None) -> Iterator[World]:
    engine = Engine(
        Ledger(CachingAllocator(capacity_bytes=capacity_bytes), out_of_memory=torch.OutOfMemoryError), Kernels()
    )
    with simulated_devices(engine):
        yield World(kind, engine, memo)


def both(kind: type[Block], times: int, *more: Any) -> tuple[int, list[Any]]:
    """How often the module ran while calls were recorded and played back; the books with and without, per call."""
    found: list[Any] = []
    for memo in (Memo(), None):
        kind.runs = 0
        books: list[Any] = []
        with world_of(kind, memo) as world:
            books.append(world.books())
            for place in range(times):
                made = world.call(("one", "two")[place % 2], torch.zeros(512, SIZE, device="cuda"), *more)
                books.append((world.books(), described(made)))
                del made
                books.append(world.books())
        found += [(kind.runs, books)]
    assert found[1][0] == times
    return found[0][0], [found[0][1], found[1][1]]


def described(made: Any) -> Any:
    if isinstance(made, torch.Tensor):
        return tuple(made.shape), made.stride(), made.storage_offset(), made.dtype, made.device
    if isinstance(made, tuple):
        return tuple(map(described, made))
    return {key: described(value) for key, value in made.items()} if isinstance(made, dict) else made


@pytest.mark.parametrize("kind", [Block, Views])
def test_a_second_forward_of_the_kind_is_played_back(kind: type[Block]) -> None:
    runs, (played, run) = both(kind, 5)
    assert runs == 1
    assert played == run


@pytest.mark.parametrize("kind", [Keeps, Counts])
def test_a_module_with_a_memory_of_its_own_is_run(kind: type[Block]) -> None:
    runs, (played, run) = both(kind, 4)
    assert runs == 4
    assert played == run


def test_joining_tiles_is_played_back() -> None:
    Joins.joined = 0
    runs, (played, run) = both(Joins, 4)
    assert (runs, Joins.joined) == (4, 1 + 4)
    assert played == run


def test_joining_what_is_known_is_run() -> None:
    Joins.joined = 0
    with world_of(Joins, Memo()) as world:
        world.engine.ledger.modules.append("one")
        for _ in range(3):
            known = torch.ones(8, 4, device="cuda")
            joined = world.modules["one"].blend_v(known[:4], known[4:], 2)
            assert joined.sum() == 16, "its values are still believed"
    assert Joins.joined == 3


class Caches(Block):
    """Replaces tensors of a list in the middle of its forward, and counts in another, as Wan's VAE does."""

    def forward(self, given: Any, *more: Any) -> Any:
        cache, index = more
        made = super().forward(given)
        for place in range(2):
            index[0] += 1
            before = cache[place]
            cache[place] = made[-2 - place :].clone()
            made = made + 1 if before is None else made + before[:1]
            del before
        cache[2] = "seen"
        return made.square()


def test_lists_are_changed_as_the_module_changes_them() -> None:
    found: list[Any] = []
    for memo in (Memo(), None):
        Caches.runs = 0
        books: list[Any] = []
        with world_of(Caches, memo) as world:
            for _ in range(2):  # pictures, of five frames each
                cache: list[Any] = [None, None, None]
                for frame in range(5):
                    index = [0]
                    made = world.call(("one", "two")[frame % 2], torch.zeros(512, SIZE, device="cuda"), cache, index)
                    assert index == [2]
                    books.append((world.books(), described(made), described(tuple(cache[:2])), cache[2]))
                    del made
                    books.append(world.books())
                cache.clear()
                books.append(world.books())
        found.append((Caches.runs, books))
    assert [runs for runs, _ in found] == [2, 10]  # the first frame and one of all that follow
    assert found[0][1] == found[1][1]


def test_what_cannot_be_compared_in_a_list_is_a_reason_to_run() -> None:
    runs, (played, run) = both(Block, 3, [object()])
    assert runs == 3
    assert played == run


def test_another_shape_is_another_forward() -> None:
    memo = Memo()
    Block.runs = 0
    with world_of(Block, memo) as world:
        for rows in (512, 256, 512, 256):
            assert world.call("one", torch.zeros(rows, SIZE, device="cuda")).shape == (rows, SIZE)
    assert Block.runs == 2


def test_views_share_the_memory_they_shared() -> None:
    with world_of(Views, Memo()) as world:
        given = torch.zeros(512, SIZE, device="cuda")
        world.call("one", given)
        first, rest = world.call("two", given)
        assert rest["same"] is given
        assert first.block is rest["second"].block
        assert rest["view"].block is given.block
        before = world.engine.ledger.allocator.allocated_bytes
        first.add_(1)
        del first
        assert world.engine.ledger.allocator.allocated_bytes == before, "its other half is still there"
        del rest
        assert world.engine.ledger.allocator.allocated_bytes == before - 512 * SIZE * 4


def test_tiles_of_one_tensor_are_alike_wherever_they_start() -> None:
    """What is returned of a tile's own memory starts where that tile does."""
    offsets = []
    for memo in (Memo(), None):
        Views.runs = 0
        with world_of(Views, memo) as world:
            whole = torch.zeros(2048, SIZE, device="cuda")
            made = [world.call("one", whole[start : start + 512]) for start in (0, 512, 1024)]
            offsets.append([(item[1]["view"].storage_offset(), item[0].storage_offset()) for item in made])
            assert all(item[1]["view"].block is whole.block for item in made)
        assert Views.runs == (1 if memo else 3)
    assert offsets == [[(0, 0), (512 * SIZE, 0), (1024 * SIZE, 0)]] * 2


def test_how_far_apart_two_arguments_start_makes_a_difference() -> None:
    Block.runs = 0
    with world_of(Block, Memo()) as world:
        whole = torch.zeros(2048, SIZE, device="cuda")
        for first, second in ((0, 512), (512, 1024), (0, 1024)):
            world.call("one", whole[first : first + 512], whole[second : second + 512])
    assert Block.runs == 2


def test_memory_runs_out_in_the_same_place() -> None:
    told = []
    for memo in (Memo(), None):
        with world_of(Block, memo, 64 * MIB) as world:
            kept = [world.call("one", torch.zeros(512, SIZE, device="cuda"))]
            with pytest.raises(torch.OutOfMemoryError) as error:
                kept += [world.call("two", torch.zeros(512, SIZE, device="cuda")) for _ in range(40)]
        told.append((str(error.value), world.books()[:2], len(kept)))
    assert told[0] == told[1]


def test_hooks_inside_are_a_reason_to_run() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    Block.runs = 0
    with world_of(Block, Memo()) as world:
        add_hook_to_module(world.modules["one"].layer, ModelHook())
        for _ in range(3):
            world.call("one", torch.zeros(512, SIZE, device="cuda"))
    assert Block.runs == 3
