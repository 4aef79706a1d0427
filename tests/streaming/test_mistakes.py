"""Mistakes put into the engine on purpose: an event, a wait or a check left out. The race-finding device sees each."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.race_device import RaceError, race_device
from tests.support.random_nets import NetSpec, Pipe, copy_of, put_on
from vramplan.streaming import backend
from vramplan.streaming.backend import TorchBackend
from vramplan.streaming.cache import Cache
from vramplan.streaming.member import Member
from vramplan.streaming.tensors import Block

nothing = lambda *_, **__: None  # noqa: E731
SIZES = [[16], [40, 5], [16, 16], [40], [5, 40]]
TEXT = [[40, 5], [40, 40], [40, 40]]
ORDERS = [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [0, 1, 2, 3, 4]]
ALL_STREAMED = {"transformer": {"streamed": 5}, "text_encoder": {}, "vae": {}}
HALF_LOCKED = {"transformer": {"streamed": 3, "locked": 3}, "text_encoder": {"locked": 1}, "vae": {"locked": 1}}

ONE_STREAMED = {"transformer": {"streamed": 1}}
ALL_LOCKED = {"transformer": {"streamed": 5, "locked": 5}}
FORMS = {"gathered": ALL_STREAMED, "half": HALF_LOCKED, "one": ONE_STREAMED, "locked": ALL_LOCKED}


def without_order(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """One of the backend's functions does nothing."""
    return lambda patch: patch.setattr(TorchBackend, name, nothing)


def allocate_unordered(patch: pytest.MonkeyPatch) -> None:
    """New memory is filled without waiting for the kernels that had it before."""
    plain = TorchBackend.allocate

    def allocate(self: Any, size: int, owner: str) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(TorchBackend, "copy_after_compute", nothing)
            return plain(self, size, owner)

    patch.setattr(TorchBackend, "allocate", allocate)


def evict_unordered(patch: pytest.MonkeyPatch) -> None:
    """A slot is filled again without waiting for the kernels that read it."""
    plain = Cache._slot

    def slot(self: Any, *args: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            if self.members and any(len(member.slots) == 2 for member in self.members):
                inner.setattr(TorchBackend, "copy_after_compute", nothing)
            return plain(self, *args)

    patch.setattr(Cache, "_slot", slot)


def emptied_slot_unordered(patch: pytest.MonkeyPatch) -> None:
    """A slot whose block gave it up is filled without waiting for the kernels that read it."""
    plain = Cache._slot

    def slot(self: Any, member: Member, size: int, upcoming: Any) -> Any:
        emptied = [item for item in member.slots if item.block is None]
        with pytest.MonkeyPatch.context() as inner:
            if emptied:
                inner.setattr(TorchBackend, "copy_after_compute", nothing)
            return plain(self, member, size, upcoming)

    patch.setattr(Cache, "_slot", slot)


def prefetch_into_running(patch: pytest.MonkeyPatch) -> None:
    """A block that runs gives its slot to the next."""
    plain = Cache._slot

    def slot(self: Any, member: Member, size: int, upcoming: Any) -> Any:
        for item in member.slots:
            if item.block is not None and item.block.active:
                self._evict(item.block)
                self.backend.copy_after_compute()
                return item
        return plain(self, member, size, upcoming)

    patch.setattr(Cache, "_slot", slot)


def stage_reused_at_once(patch: pytest.MonkeyPatch) -> None:
    """A page-locked buffer is written again while a copy reads it."""

    def free_stage(self: Any) -> Any:
        if not self._stages:
            return backend.torch.empty(backend.STAGE_BYTES, dtype=torch.uint8, pin_memory=True)
        return self._stages.pop(0)[0]

    patch.setattr(TorchBackend, "_free_stage", free_stage)


def gather_too_early(patch: pytest.MonkeyPatch) -> None:
    """The event of a gathered block is recorded when it is asked for, not when its copies are enqueued."""
    plain = TorchBackend.gather

    def gather(self: Any, buffer: Any, parts: Any) -> Any:
        event = self._side.record_event()
        plain(self, buffer, parts)
        return event

    patch.setattr(TorchBackend, "gather", gather)


def ticket_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A block that was copied for nothing is dropped without waiting for the copy."""

    def evict(self: Any, block: Block) -> None:
        block.ticket = None
        self._hide(block)
        block.off_device()

    patch.setattr(Cache, "_evict", evict)


def never_outdated(patch: pytest.MonkeyPatch) -> None:
    """A block on the device is not copied again after its masters were changed."""
    patch.setattr(Block, "outdated", False)


def never_exposed(patch: pytest.MonkeyPatch) -> None:
    """Callbacks may change masters that copies still read."""
    plain = Cache.call
    patch.setattr(Cache, "call", lambda self, exposed=False: plain(self))


def ahead_unordered(patch: pytest.MonkeyPatch) -> None:
    """Memory that the last blocks of a component gave up is filled without waiting for the kernels that read it."""
    plain = Cache._start_next

    def start_next(self: Any, ahead: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(TorchBackend, "copy_after_compute", nothing)
            plain(self, ahead)

    patch.setattr(Cache, "_start_next", start_next)


def ahead_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    """A component finds the blocks that were copied ahead, and does not wait for the copies."""
    plain = Cache._begin_run

    def begin_run(self: Any, member: Member) -> None:
        for block in member.blocks if self._ahead.member is member and self._ahead.begun else ():
            block.ticket = None
        plain(self, member)

    patch.setattr(Cache, "_begin_run", begin_run)


def never_retracted(patch: pytest.MonkeyPatch) -> None:
    """What was copied ahead for nothing stays beside the component that runs on."""
    patch.setattr(Cache, "_retract", nothing)


def rest_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Weights outside of blocks stay in host memory."""
    plain = Cache._bring
    patch.setattr(
        Cache, "_bring", lambda self, member, block: None if block is member.rest else plain(self, member, block)
    )


def never_dropped(patch: pytest.MonkeyPatch) -> None:
    """After a call blocks stay on the device."""
    patch.setattr(Cache, "drop_all", nothing)


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "copies never wait for kernels": without_order("copy_after_compute"),
    "kernels never wait for copies": without_order("compute_after"),
    "nothing is finished": without_order("finish"),
    **{
        function.__name__: function
        for function in (
            allocate_unordered, evict_unordered, emptied_slot_unordered, prefetch_into_running, stage_reused_at_once,
            gather_too_early, ticket_forgotten, never_outdated, never_exposed, ahead_unordered, ahead_not_waited_for,
            never_retracted, rest_forgotten, never_dropped,
        )
    },
}  # fmt: skip


def change_all(pipe: Pipe, step: int) -> None:
    """A callback that changes all weights of the transformer."""
    change(pipe.transformer, step)


def change_blocks(pipe: Pipe, step: int) -> None:
    """A callback that changes those in blocks."""
    change(pipe.transformer.blocks, step)


def change_next(pipe: Pipe, step: int) -> None:
    """A callback that changes what is copied ahead for the VAE."""
    change(pipe.vae, step - 2)


def change(module: torch.nn.Module, step: int) -> None:
    if step == 0:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)


def outcome(division: dict[str, dict[str, int]]) -> str:
    """Call a pipeline on the device, in the ways that need every wait, and say what went wrong."""
    torch.manual_seed(0)
    nets = [NetSpec(sizes=TEXT, tied=True, orders=[[0, 1, 2]]), None, NetSpec(sizes=SIZES, tied=False, orders=ORDERS)]
    pipe = Pipe(*nets)  # type: ignore[arg-type]
    plain = copy_of(pipe)
    try:
        with race_device(stage_bytes=512) as device, torch.no_grad():
            device.adopt_all(pipe)
            put_on(pipe, division)
            for callback in (None, change_all, change_blocks, change_next, None):
                if not torch.equal(plain(3, callback), pipe(3, callback)):
                    return "other bits"
                gc.collect()
                device.reuse()
                if device.memory.used:
                    return "memory kept"
            peak = device.memory.peak
            if not torch.equal(plain(4), pipe(4)):
                return "other bits"
            if device.memory.peak > peak:
                return "more memory"
    except (RaceError, RuntimeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("form", sorted(FORMS))
def test_right_without_a_mistake(form: str) -> None:
    assert outcome(FORMS[form]) == ""


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_mistake_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES[mistake](monkeypatch)
    seen = [outcome(division) for division in FORMS.values()]
    assert any(seen)
