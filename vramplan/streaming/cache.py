"""The cache of a pipeline's weights on a device: which blocks are there, and when they are copied and dropped.

Weights do not change while a pipeline runs, so dropping one from the device copies nothing: its parameter refers to
its master in host memory again. Masters that are page-locked lie in a few large chunks.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from vramplan.streaming.course import Course
from vramplan.streaming.division import SLOTS
from vramplan.streaming.hooks import Other
from vramplan.streaming.member import Ahead, Member, Slot

if TYPE_CHECKING:
    import torch

    from vramplan.streaming.backend import Backend
    from vramplan.streaming.tensors import Block


class Cache:
    """The weights of several components on one device. One call at a time may use it: `call` makes another wait."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.members: list[Member] = []
        self.notes: list[str] = []
        self._running: Member | None = None
        self._watched: dict[torch.nn.Module, tuple[Other, list[Any]]] = {}
        self._lock = threading.RLock()
        self._calls = 0
        self._exposed = True
        self._course = Course()
        self._ahead = Ahead()

    @property
    def exposed(self) -> bool:
        """Whether others may change weights before the next forward: outside of a call, or in one with a callback."""
        return self._exposed

    # ---- calls

    @contextmanager
    def call(self, *, exposed: bool = False) -> Iterator[None]:
        """Context manager around a call of the pipeline: afterwards every weight is its master again.

        In one that is `exposed` others may change weights between forwards, as without any call.
        """
        with self._lock:
            before, self._exposed = self._exposed, exposed or (self._exposed and self._calls > 0)
            if not self._calls:
                self._course.begin(self._running)
            self._calls += 1
            try:
                yield
                if self._calls == 1:
                    self._course.end()
            finally:
                self._calls -= 1
                self._exposed = before
                if not self._calls:
                    self.drop_all()

    def drop_all(self) -> None:
        """Take every block off the device."""
        self._running, self._ahead = None, Ahead()
        try:
            self.backend.finish()
        finally:
            self._drop(*self.members)

    def absorb(self, other: Cache) -> None:
        """Take over the members of another cache on the same device."""
        with self.call(), other.call():
            other.drop_all()
            for member in other.members:
                member.owner.cache = self
            self.members += other.members
            self.notes += other.notes
            other.members = []
            for module, (hook, handles) in other._watched.items():
                hook.cache = self
                self.unwatch(module)
                self._watched[module] = hook, handles
            other._watched = {}

    def watch(self, module: torch.nn.Module, entries: Iterable[torch.nn.Module], *, in_loop: bool) -> None:
        """Take blocks off the device when a component outside of the cache runs, by one of these modules of it: all
        blocks, or if it runs `in_loop` those of members that do not."""
        if module not in self._watched:
            hook = Other(self, in_loop=in_loop)
            self._watched[module] = hook, [entry.register_forward_pre_hook(hook) for entry in entries]

    def unwatch(self, module: torch.nn.Module) -> None:
        """Undo `watch`."""
        for handle in self._watched.pop(module, (None, ()))[1]:
            handle.remove()

    def others_run(self, *, in_loop: bool) -> None:
        """Let a component outside of the cache run."""
        if self._running is not None and not (in_loop and self._running.in_loop):
            self._enter(None)
            self._ahead = Ahead()
            self._drop(*self.members)

    # ---- blocks

    def begin(self, member: Member) -> None:
        """Begin a forward of the member. One that was interrupted left blocks that seem to run."""
        member.learn_order()
        member.depth = 0
        for block in member.blocks:
            if block.active:
                self._hide(block)

    def need(self, member: Member, block: Block | None = None) -> None:
        """Bring a block of the member, and its weights outside of blocks, to the device before it runs.

        Raises:
            torch.OutOfMemoryError: the device is full.
        """
        if self._running is not member:
            self._switch(member)
        if not member.depth:
            self._begin_run(member)
        member.depth += 1
        if member.rest is not None:
            self._bring(member, member.rest)
        if block is not None:
            member.seen[block] = None
            self._bring(member, block)
        self._prefetch(member, block)

    def done(self, member: Member, block: Block | None) -> None:
        """Let the tensors of a block that has run, and those outside of blocks, be their masters again. Where others
        may change these next, copies from them are done first."""
        for item in (block, member.rest):
            if item is not None and item.active:
                item.active -= 1
                if not item.active:
                    self._hide(item)
        member.depth = max(0, member.depth - 1)
        if block is not None and self._ahead.member is not None:
            self._look_ahead(member, block)
        if self._exposed and not member.depth:
            self.backend.finish()

    def _prefetch(self, member: Member, block: Block | None) -> None:
        if block is None:  # weights outside of blocks, in the middle of a forward
            block = next(reversed(member.seen), None)
        if not member.streamed and all(item.buffer is not None for item in member.order):
            return
        upcoming = list(member.ahead(block, again=member.in_loop and self._ahead.member is None))
        for item in upcoming:
            if item.buffer is None:
                self._start(member, item, {*upcoming, *([block] if block is not None else [])})

    def release(self, member: Member, *, unlock: bool = True) -> None:
        """Take the member out, its blocks off the device, and unless told otherwise its masters out of page-locked
        memory."""
        with self._lock:
            self.backend.finish()
            self._retract()
            self._drop(member)
            for block in member.blocks:
                if block.segments and unlock:
                    if block.moved:
                        block.adopt()
                    block.replace_masters([tensor.clone() for tensor in block.tensors])
                    block.segments = []
            if member in self.members:
                self.members.remove(member)
            self._running = None
            for module in list(self._watched) if unlock and not self.members else ():
                self.unwatch(module)

    def _switch(self, member: Member) -> None:
        """Let another component run: drop the blocks of those that do not run in turn with it."""
        self._drop(*(other for other in self.members if other is not member and not (other.in_loop and member.in_loop)))
        self._enter(member)

    def _enter(self, member: Member | None) -> None:
        self._running = member
        if self._calls:
            self._course.enter(member)

    def _begin_run(self, member: Member) -> None:
        """Take back what was copied ahead for another component than this one, and see which may follow this run."""
        if self._ahead.member is not member:
            self._retract()
        name = self._course.run() if self._calls else None
        others = (other for other in self.members if other is not member)
        self._ahead = Ahead(next((other for other in others if other.name == name), None))

    def _look_ahead(self, member: Member, block: Block) -> None:
        """Copy what the next component needs first, after a block in the last run of the one before it: into the
        memory of its last blocks, once all that is to run is on the device, so that no more is used than before."""
        ahead, waiting = self._ahead, member.order[: member.used]
        if block.active or any(item.buffer is None and item not in member.seen for item in waiting):
            return
        if block.buffer is not None and ahead.wanted:
            ahead.begun = True
            ahead.spare += self._give_up(member, block)
        try:
            self._start_next(ahead)
        except self.backend.out_of_memory:  # free memory in pieces: there was enough of it
            self._retract()

    def _give_up(self, member: Member, block: Block) -> int:
        """Take a block and its slot off the device; return how many bytes that are."""
        slot = block.slot
        self._evict(block)
        if slot is None:
            return block.size
        member.slots.remove(slot)
        size: int = slot.size
        return size

    def _start_next(self, ahead: Ahead) -> None:
        assert ahead.member is not None
        while ahead.wanted:
            item = ahead.wanted[0]
            if item.moved:
                item.adopt()
            size = ahead.member.slot_bytes if item in ahead.member.streamed else item.size
            if size > ahead.spare:
                return
            ahead.spare -= size
            self._start(ahead.member, ahead.wanted.pop(0), ())

    def _retract(self) -> None:
        """Take back what was copied ahead: the guess was wrong."""
        ahead, self._ahead = self._ahead, Ahead()
        if ahead.member is not None and ahead.begun:
            self._drop(ahead.member)

    def _bring(self, member: Member, block: Block) -> None:
        if block.buffer is not None and block.outdated:
            self._evict(block)
        if block.buffer is None:
            self._start(member, block)
        if block.ticket is not None:
            self.backend.compute_after(block.ticket)
            block.ticket = None
        block.show()
        block.active += 1

    def _start(self, member: Member, block: Block, upcoming: Collection[Block] | None = None) -> None:
        """Start to copy a block to the device. One that is only `upcoming` takes no slot from others that are."""
        if self._ahead.begun and member is not self._ahead.member:
            self._retract()
        if block.moved:
            block.adopt()
        buffer = None
        if block not in member.streamed:
            buffer = self.backend.allocate(block.size, member.name)
        elif (slot := self._slot(member, block.size, upcoming)) is not None:
            slot.block, block.slot, buffer = block, slot, slot.buffer
        if buffer is None:
            return
        try:
            if block.segments:
                block.ticket = self.backend.copy(buffer, block.segments)
            else:
                block.ticket = self.backend.gather(buffer, list(zip(block.offsets, block.tensors, strict=True)))
        except BaseException:  # some of the copies may be on their way, and nothing else would wait for them
            self.backend.finish()
            raise
        block.on_device(buffer, self.backend.view, block.slot.views if block.slot is not None else {})

    def _slot(self, member: Member, size: int, upcoming: Collection[Block] | None) -> Slot | None:
        """A slot for a streamed block, emptied once the kernels launched so far are done with it.

        Blocks that run now do not give way, and `upcoming` ones only to one that is needed at once; None if none does.
        """
        if len(member.slots) < SLOTS:
            size = member.slot_bytes
            member.slots.append(Slot(self.backend.allocate(size, member.name), size))
            return member.slots[-1]
        for slot in member.slots:
            held = slot.block
            if slot.size >= size and (held is None or not (held.active or held in (upcoming or ()))):
                if held is not None:
                    self._evict(held)
                self.backend.copy_after_compute()  # also if it was emptied before: a block changed since gives it up
                return slot
        if upcoming is not None:
            return None
        member.slots.append(Slot(self.backend.allocate(size, member.name), size))
        return member.slots[-1]

    def _evict(self, block: Block) -> None:
        ticket, block.ticket = block.ticket, None
        try:
            if ticket is not None:  # never waited for: its memory must not be used before the copy is done
                self._settle(ticket)
        finally:
            self._hide(block)
            block.off_device()

    def _settle(self, ticket: Any) -> None:
        try:
            self.backend.compute_after(ticket)
        except Exception:  # the copy failed, which matters only to those who need the block
            self.backend.finish()

    def _hide(self, block: Block) -> None:
        """Let the block's tensors be their masters: it does not run any more."""
        block.active = 0
        block.hide()
        block.refuse_later_backward()

    def _drop(self, *members: Member) -> None:
        with ExitStack() as stack:  # every block, whatever fails
            for member in members:
                for block in member.blocks:
                    if block.buffer is not None or block.ticket is not None or block.active:
                        stack.callback(self._evict, block)
                member.slots, member.depth = [], 0
