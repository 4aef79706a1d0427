"""The cache of a pipeline's weights on a device: which blocks are there, and when they are copied and dropped.

Weights do not change while a pipeline runs, so dropping one from the device copies nothing: its parameter refers to
its master in host memory again. Masters that are page-locked lie in a few large chunks.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vramplan.errors import VramplanError
from vramplan.streaming.backend import Backend
from vramplan.streaming.division import SLOTS
from vramplan.streaming.tensors import Block, Leaf, aligned
from vramplan.units import format_bytes

# Page-locked chunks are powers of two, as torch's host allocator rounds up to these, and at most this large: while a
# component is moved into them, one chunk more than its weights is needed.
_CHUNK_BYTES = 1 << 30
_LEAST_CHUNK_BYTES = 1 << 20


class Slot:
    """A buffer on the device that streamed blocks share in turn."""

    __slots__ = ("block", "buffer", "size")

    def __init__(self, buffer: Any, size: int) -> None:
        self.buffer = buffer
        self.size = size
        self.block: Block | None = None


class Member:
    """A component in the cache. `rest` are its weights outside of blocks, None if they are not part of the cache.

    `order` is the order in which its blocks ran last, at first that of their definition, `seen` that of the forward
    that runs now. Those that are not `streamed` stay while the component's phase lasts: until another component runs,
    or one outside of the loop for members that run `in_loop`.
    """

    def __init__(
        self, name: str, rest: Block | None, order: Sequence[Block], streamed: Collection[Block], *, in_loop: bool
    ) -> None:
        self.name = name
        self.rest = rest
        self.streamed = frozenset(streamed)
        self.in_loop = in_loop
        self.slots: list[Slot] = []
        self.order = list(order)
        self.seen: dict[Block, None] = {}

    @property
    def blocks(self) -> Iterator[Block]:
        """Every block of it, the rest first."""
        yield from ([self.rest] if self.rest is not None else [])
        yield from self.order

    def begin_forward(self) -> None:
        """Learn the order of the last forward. One that was interrupted left blocks marked as running."""
        if self.seen:
            missing = [block for block in self.order if block not in self.seen]
            self.order = [*self.seen, *missing]
        self.seen = {}
        for block in self.blocks:
            block.active = 0

    def ahead(self, block: Block | None) -> Iterator[Block]:
        """The blocks that run after this one, to the next streamed one; in a loop the first follow the last."""
        order = self.order
        start = order.index(block) + 1 if block is not None else 0
        before = order[: start - 1] if self.in_loop and start else []
        for item in (*order[start:], *before):
            yield item
            if item in self.streamed:
                return


class Other:
    """A hook before the forward of a component outside of the cache. Copies have one without a cache."""

    __slots__ = ("cache",)

    def __init__(self, cache: Cache | None) -> None:
        self.cache = cache

    def __call__(self, module: torch.nn.Module, given: Any) -> None:
        """Take all blocks off the device."""
        if self.cache is not None:
            self.cache.others_run()

    def __reduce__(self) -> Any:
        """Without the cache, for pickle and `deepcopy`."""
        return Other, (None,)


class Cache:
    """The weights of several components on one device. One call at a time may use it: `call` makes another wait."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.members: list[Member] = []
        self.notes: list[str] = []
        self._running: Member | None = None
        self._watched: dict[torch.nn.Module, list[Any]] = {}
        self._lock = threading.RLock()
        self._calls = 0

    # ---- calls

    @contextmanager
    def call(self) -> Iterator[None]:
        """Context manager around a call of the pipeline: afterwards every weight is its master again."""
        with self._lock:
            self._calls += 1
            try:
                yield
            finally:
                self._calls -= 1
                if not self._calls:
                    self.drop_all()

    def drop_all(self) -> None:
        """Take every block off the device."""
        self.backend.finish()
        for member in self.members:
            self._drop(member)
        self._running = None

    def watch(self, module: torch.nn.Module, entries: Iterable[torch.nn.Module]) -> None:
        """Take all blocks off the device when a component outside of the cache runs, by one of these modules of it."""
        if module not in self._watched:
            self._watched[module] = [entry.register_forward_pre_hook(Other(self)) for entry in entries]

    def unwatch(self, module: torch.nn.Module) -> None:
        """Watch the component no longer: it was taken into the cache."""
        for handle in self._watched.pop(module, ()):
            handle.remove()

    def leave(self, member: Member) -> None:
        """Let a member go that has nothing on the device."""
        if member in self.members:
            self.members.remove(member)
        if not self.members:
            for watched in list(self._watched):
                self.unwatch(watched)

    def others_run(self) -> None:
        """Let a component outside of the cache run."""
        if self._running is not None:
            self._running = None
            for member in self.members:
                self._drop(member)

    # ---- blocks

    def need(self, member: Member, block: Block | None = None) -> None:
        """Bring a block of the member, and its weights outside of blocks, to the device before it runs.

        Raises:
            torch.OutOfMemoryError: the device is full.
        """
        if self._running is not member:
            self._switch(member)
        if member.rest is not None:
            self._bring(member, member.rest)
        if block is not None:
            member.seen[block] = None
            self._bring(member, block)
        upcoming = list(member.ahead(block))
        for item in upcoming:
            if item.buffer is None:
                self._start(member, item, {*upcoming, *([block] if block is not None else [])})

    def release(self, member: Member) -> None:
        """Take the member out, its blocks off the device, and its masters out of page-locked memory."""
        self.backend.finish()
        self._drop(member)
        for block in member.blocks:
            if block.segments:
                block.replace_masters([tensor.clone() for tensor in block.tensors])
                block.segments = []
        self.leave(member)
        self._running = None

    def take_off(self, block: Block) -> None:
        """Take one block off the device."""
        if block.buffer is not None:
            self._evict(block)

    def _switch(self, member: Member) -> None:
        """Let another component run: drop the blocks of those that do not run in turn with it."""
        for other in self.members:
            if other is not member and not (other.in_loop and member.in_loop):
                self._drop(other)
        self._running = member

    def _bring(self, member: Member, block: Block) -> None:
        if block.buffer is None:
            self._start(member, block)
        if block.ticket is not None:
            self.backend.compute_after(block.ticket)
            block.ticket = None

    def _start(self, member: Member, block: Block, upcoming: Collection[Block] | None = None) -> None:
        """Start to copy a block to the device. One that is only `upcoming` takes no slot from others that are."""
        if block.moved:
            block.adopt()
        buffer = None
        if block not in member.streamed:
            buffer = self.backend.allocate(block.size, member.name)
        elif (slot := self._slot(member, block.size, upcoming)) is not None:
            slot.block, block.slot, buffer = block, slot, slot.buffer
        if buffer is None:
            return
        if block.segments:
            block.ticket = self.backend.copy(buffer, block.segments)
        else:
            block.ticket = self.backend.gather(buffer, list(zip(block.offsets, block.tensors, strict=True)))
        block.buffer = buffer
        block.show(lambda offset, like: self.backend.view(buffer, offset, like))

    def _slot(self, member: Member, size: int, upcoming: Collection[Block] | None) -> Slot | None:
        """A slot for a streamed block, emptied once the kernels launched so far are done with it.

        Blocks that run now do not give way, and `upcoming` ones only to one that is needed at once; None if none does.
        """
        largest = max(block.size for block in member.streamed)
        while len(member.slots) < SLOTS:
            member.slots.append(Slot(self.backend.allocate(largest, member.name), largest))
        for slot in member.slots:
            held = slot.block
            if slot.size >= size and (held is None or not (held.active or held in (upcoming or ()))):
                if held is not None:
                    self._evict(held)
                    self.backend.copy_after_compute()
                return slot
        if upcoming is not None:
            return None
        member.slots.append(Slot(self.backend.allocate(size, member.name), size))
        return member.slots[-1]

    def _evict(self, block: Block) -> None:
        if block.ticket is not None:  # never waited for: its memory must not be used before the copy is done
            self.backend.compute_after(block.ticket)
            block.ticket = None
        if block.edited:
            self._copy_back(block)
        if torch.is_grad_enabled():
            _refuse_later_backward(block)
        block.show_masters()
        if block.slot is not None:
            block.slot.block = block.slot = None
        block.buffer = None

    def _copy_back(self, block: Block) -> None:
        """Write what was changed on the device into the masters, which are memory of the process from then on: a
        mapped file is private."""
        with torch.no_grad():
            for leaf, masters in zip(block.leaves, block.masters, strict=True):
                for now, master in zip(leaf.plain(), masters, strict=True):
                    master.copy_(now)

    def _drop(self, member: Member) -> None:
        for block in member.blocks:
            if block.buffer is not None:
                self._evict(block)
        member.slots = []

    # ---- host memory

    def page_lock(self, blocks: Iterable[Block], owner: str) -> None:
        """Move masters into page-locked chunks, block by block. Where the system refuses one, they stay as they are."""
        waiting, place = [block for block in blocks if block.size], -1
        left = sum(block.size for block in waiting)
        gaps: list[tuple[Any, int, int]] = []  # chunk, first free byte, free bytes
        for block in waiting:
            tensors: list[tuple[Any, int, int, torch.Tensor]] = []
            for tensor in block.tensors:
                size = aligned(tensor.numel() * tensor.element_size())
                # a place right after the tensor before needs no copy of its own
                places = ([place] if tensors else []) + list(range(len(gaps)))
                place = next((number for number in places if gaps[number][2] >= size), -1)
                if place < 0:
                    chunk_bytes = _chunk_bytes(size, left)
                    try:
                        chunk = self.backend.page_lock(chunk_bytes, owner)
                    except RuntimeError as error:
                        self._note_refusal(owner, left, error)
                        return
                    gaps.append((chunk, 0, chunk_bytes))
                    place = len(gaps) - 1
                chunk, start, free = gaps[place]
                gaps[place] = (chunk, start + size, free - size)
                left -= size
                tensors.append((chunk, start, size, tensor))
            self._lock_block(block, tensors)

    def _lock_block(self, block: Block, placed: Sequence[tuple[Any, int, int, torch.Tensor]]) -> None:
        """Copy the masters of a block to their places in page-locked chunks."""
        segments: list[tuple[Any, int, int, int]] = []
        for (chunk, start, size, _), offset in zip(placed, block.offsets, strict=True):
            last = segments[-1] if segments else None
            if last is not None and last[0] is chunk and last[1] + last[3] == start:
                segments[-1] = (chunk, last[1], last[2], last[3] + size)
            else:
                segments.append((chunk, start, offset, size))
        block.replace_masters([self.backend.write(chunk, start, tensor) for chunk, start, _, tensor in placed])
        block.segments = segments

    def _note_refusal(self, owner: str, left: int, error: RuntimeError) -> None:
        reason = str(error).partition("\n")[0]
        self.notes.append(f"{owner}: {format_bytes(left)} could not be page-locked ({reason}): copied more slowly")


def _chunk_bytes(size: int, left: int) -> int:
    """The bytes of the next chunk: a power of two that holds the tensor, near what is left to place."""
    wanted = max(size, min(_CHUNK_BYTES, 1 << (left.bit_length() - 1)), _LEAST_CHUNK_BYTES)
    return 1 << (wanted - 1).bit_length()


def _refuse_later_backward(block: Block) -> None:
    """Let torch refuse a backward pass through weights that are no longer there (`increment_version`)."""
    for leaf in block.leaves:
        if type(leaf) is Leaf and not leaf.tensor.is_inference():
            torch.autograd.graph.increment_version(leaf.tensor)


def refuse_training(module: torch.nn.Module) -> None:
    """Raise VramplanError if the module is about to be trained: gradients need every weight to stay."""
    if module.training and torch.is_grad_enabled():
        raise VramplanError(
            f"{type(module).__name__} cannot be trained while its weights are streamed: undo the plan, or call eval()"
        )
