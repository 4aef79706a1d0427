"""A component in the cache: its blocks in the order in which they run, and the slots of those that are streamed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vramplan.streaming.division import SLOTS

if TYPE_CHECKING:
    from vramplan.streaming.tensors import Block


class Slot:
    """A buffer on the device that streamed blocks share in turn. `views` of it are kept for those that come again."""

    __slots__ = ("block", "buffer", "size", "views")

    def __init__(self, buffer: Any, size: int) -> None:
        self.buffer = buffer
        self.size = size
        self.block: Block | None = None
        self.views: dict[Block, Any] = {}


class Member:
    """A component in the cache. `rest` are its weights outside of blocks, None if they are not part of the cache.

    `order` is the order in which its blocks ran last, at first that of their definition, those that did not run at its
    end, from place `used` on; `seen` is that of the forward that runs now. Those that are not `streamed` stay while the
    component's phase lasts: until another component runs, or one outside of the loop for members that run `in_loop`.
    `owner` is told which cache the member is in.
    """

    def __init__(
        self,
        name: str,
        rest: Block | None,
        order: Sequence[Block],
        streamed: Collection[Block],
        *,
        in_loop: bool,
        owner: Any = None,
    ) -> None:
        self.name = name
        self.rest = rest
        self.streamed = frozenset(streamed)
        self.in_loop = in_loop
        self.owner = owner
        self.slots: list[Slot] = []
        self.depth = 0  # forwards that run now, one in another
        self.order = list(order)
        self.used = len(self.order)
        self.seen: dict[Block, None] = {}

    @property
    def blocks(self) -> Iterator[Block]:
        """Every block of it, the rest first."""
        yield from ([self.rest] if self.rest is not None else [])
        yield from self.order

    def learn_order(self) -> None:
        """Learn the order of the last forward, before the next."""
        if self.seen:
            missing = [block for block in self.order if block not in self.seen]
            self.order, self.used = [*self.seen, *missing], len(self.seen)
        self.seen = {}

    def ahead(self, block: Block | None, *, again: bool) -> Iterator[Block]:
        """The blocks that run after this one, to the next streamed one; if it runs `again` the first follow the
        last."""
        order = self.order
        start = order.index(block) + 1 if block is not None else 0
        before = order[: start - 1] if again and start else []
        for item in (*order[start:], *before):
            yield item
            if item in self.streamed:
                return

    def first(self) -> Iterator[Block]:
        """What a run needs first, up to as many streamed blocks as are on the device at a time."""
        left = SLOTS
        for item in self.blocks:
            left -= item in self.streamed
            if left < 0:
                return
            yield item

    @property
    def slot_bytes(self) -> int:
        """The bytes of a slot, which holds every streamed block."""
        return max(block.size for block in self.streamed)


class Ahead:
    """The component that runs after the last run of another one, as far as that can be told, and the memory for it.

    `wanted` are the blocks that it needs first and that are not on their way yet. It has `begun` once the other
    component gave up blocks for it, of whose bytes `spare` are left.
    """

    __slots__ = ("begun", "member", "spare", "wanted")

    def __init__(self, member: Member | None = None) -> None:
        self.member = member
        self.wanted = [item for item in member.first() if item.buffer is None] if member is not None else []
        self.begun = False
        self.spare = 0
