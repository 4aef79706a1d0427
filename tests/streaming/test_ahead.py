"""Copies across the border of components: when they are made, into how much memory, and what a wrong guess costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.streaming.test_races import PLAIN, pipelines
from tests.support.race_device import RaceDevice, race_device
from tests.support.random_nets import FailureError, NetSpec, Pipe, copy_of, no_device_views, put_on, undo
from vramplan.streaming.attach import ATTACHED
from vramplan.streaming.cache import Cache
from vramplan.streaming.course import Course
from vramplan.streaming.member import Member

ORDER = [[0, 1, 2, 3]]
STREAMED = {"text_encoder": {"streamed": 4, "locked": 4}, "transformer": {"streamed": 4}, "vae": {}}
BY_PHASE = {"text_encoder": {}, "transformer": {"locked": 5}, "vae": {}}


def three_parts() -> Pipe:
    torch.manual_seed(0)
    text = NetSpec(sizes=[[40, 5]] * 4, tied=False, orders=ORDER)
    return Pipe(text, None, NetSpec(sizes=[[16, 5]] * 4, tied=False, orders=ORDER))


class Log(list[str]):
    """The runs of components, and the blocks that were copied while another one ran: `text_encoder>transformer.0`."""

    def ahead(self) -> list[str]:
        """The blocks copied ahead."""
        return [item for item in self if ">" in item]


@contextmanager
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    log = Log()
    start, begin = Cache._start, Cache._begin_run

    def note_start(self: Any, member: Member, block: Any, *more: Any) -> None:
        if self._running is not member:
            log.append(f"{self._running.name}>{block.name}")
        start(self, member, block, *more)

    def note_run(self: Any, member: Member) -> None:
        log.append(member.name)
        begin(self, member)

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "_start", note_start)
        patch.setattr(Cache, "_begin_run", note_run)
        yield log


@contextmanager
def streamed(pipe: Pipe, division: dict[str, dict[str, int]]) -> Iterator[RaceDevice]:
    with race_device(stage_bytes=512) as device, torch.no_grad():
        device.adopt_all(pipe)
        put_on(pipe, division)
        yield device
        undo(pipe)


@pytest.mark.parametrize(("division", "blocks"), [(STREAMED, 2), (BY_PHASE, 4)], ids=["streamed", "by phase"])
def test_the_next_component_is_begun_in_the_last_run_before_it(
    division: Any, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = three_parts()
    plain = copy_of(pipe)
    with streamed(pipe, division), logged(monkeypatch) as log:
        assert torch.equal(pipe(), plain())
        assert not log.ahead()
        for _ in range(2):
            log.clear()
            assert torch.equal(pipe(), plain())
            assert log[: 2 + blocks] == [
                "text_encoder", "text_encoder>transformer",
                *(f"text_encoder>transformer.{number}" for number in range(blocks)),
            ]  # fmt: skip
            assert log[2 + blocks :] == ["transformer", "transformer", "transformer>vae", "vae"]


def test_alone_and_after_a_failure_nothing_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = three_parts()
    plain = copy_of(pipe)
    with streamed(pipe, STREAMED), logged(monkeypatch) as log:
        pipe.transformer.fail = 2
        with pytest.raises(FailureError):
            pipe()
        plain.transformer.calls = pipe.transformer.calls = 0
        assert torch.equal(pipe(), plain())
        assert not log.ahead()
        for _ in range(2):  # as `encode_prompt` does
            assert torch.equal(pipe.text_encoder(torch.ones(1, 8)), plain.text_encoder(torch.ones(1, 8)))
        assert not log.ahead()
        assert torch.equal(pipe(), plain())  # it is on the device when the call begins
        pipe.transformer.fail = 2
        with pytest.raises(FailureError):
            pipe()
        assert no_device_views(pipe)
        log.clear()
        assert torch.equal(pipe(), plain())
        assert log.ahead()


def other_encoder_run(pipe: Pipe) -> torch.Tensor:
    """A call whose prompt is encoded twice."""
    with pipe_call(pipe):
        pipe.text_encoder(torch.ones(2, 8))
        return Pipe.__call__(pipe)


@contextmanager
def pipe_call(pipe: Pipe) -> Iterator[None]:
    stream = vars(pipe.text_encoder).get(ATTACHED)
    if stream is None:
        yield
        return
    with stream.cache.call():
        yield


WRONG: dict[str, Callable[[Pipe], Any]] = {
    "more steps": lambda pipe: pipe(4),
    "fewer steps": lambda pipe: pipe(1),
    "no step": lambda pipe: pipe(0),
    "encoded twice": other_encoder_run,
    "another order of blocks": lambda pipe: [setattr(pipe.transformer, "orders", [[3, 1, 0, 2, 0]]), pipe()][1],
    "an encoder in another order": lambda pipe: [setattr(pipe.text_encoder, "orders", [[3, 2, 1, 0]]), pipe()][1],
    "a block that runs twice": lambda pipe: [setattr(pipe.text_encoder, "orders", [[0, 1, 2, 3, 0]]), pipe()][1],
}


@pytest.mark.parametrize("division", [STREAMED, BY_PHASE], ids=["streamed", "by phase"])
@pytest.mark.parametrize("wrong", sorted(WRONG))
def test_a_wrong_guess_costs_no_memory_and_no_bits(wrong: str, division: Any) -> None:
    pipe = three_parts()
    plain = copy_of(pipe)
    with streamed(pipe, division) as device:
        assert torch.equal(pipe(), plain())
        peak = device.memory.peak
        assert torch.equal(pipe(), plain())
        assert torch.equal(WRONG[wrong](pipe), WRONG[wrong](plain))
        assert torch.equal(pipe(), plain())
        device.reuse()
        assert device.memory.used == 0
        assert device.memory.peak == peak


@PLAIN
@given(case=pipelines(), steps=st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_memory_is_what_it_is_without_guesses(case: Any, steps: list[int]) -> None:
    pipe, division, late = case
    plain, found = copy_of(pipe), []
    for guess in (False, True):
        part = copy_of(plain)
        with race_device(late) as device, torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            if not guess:
                patch.setattr(Course, "run", lambda self: None)
            device.adopt_all(part)
            put_on(part, division)
            made = [part(number) for number in steps]
            found.append((device.memory.peak, made))
            undo(part)
    (peak, made), (peak_ahead, made_ahead) = found
    assert peak_ahead <= peak
    assert all(torch.equal(*pair) for pair in zip(made, made_ahead, strict=True))
