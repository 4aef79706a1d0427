"""Weight streaming on a device that finds races, over random modules: no race, the same bits, and all as before."""

from __future__ import annotations

import os
import random
import threading
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.race_device import RaceDevice, race_device
from tests.support.random_nets import (
    FailureError,
    Pipe,
    copy_of,
    differing,
    divisions,
    net_specs,
    no_device_views,
    put_on,
    state_of,
    undo,
    values_of,
)

PLAIN = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes
    max_examples=600 if os.environ.get("VRAMPLAN_TESTS") == "all" else 20,
)
LATENESS = {"always": lambda _: True, "never": lambda _: False, "at random": lambda r: r.random() < 0.5}


@st.composite
def pipelines(draw: Any) -> tuple[Pipe, dict[str, dict[str, int]], Any]:
    """A pipeline, how it is streamed, and which copies are late."""
    text, net = draw(net_specs(3)), draw(net_specs())
    control = draw(st.none() | net_specs(3))
    torch.manual_seed(draw(st.integers(0, 99)))
    pipe = Pipe(text, control, net)
    choose, rng = LATENESS[draw(st.sampled_from(sorted(LATENESS)))], random.Random(draw(st.integers(0, 99)))
    return pipe, draw(divisions(pipe)), lambda: choose(rng)


def edit(pipe: Pipe, number: int) -> None:
    """Change a weight in place, in one of the ways that there are."""
    with torch.no_grad():
        tensor = list(pipe.transformer.parameters())[number % 7]
        if number % 3 == 0:
            tensor.mul_(1.5)
        elif number % 3 == 1:
            tensor.data = tensor.data * 0.5
        else:
            pipe.transformer.load_state_dict({k: v * 0.9 for k, v in pipe.transformer.state_dict().items()})


def act(pipe: Pipe, action: str, number: int, device: RaceDevice | None) -> Any:
    """Do something with a pipeline; on a `device` also what interrupts it. Returns what was computed."""
    if action == "edit":
        return edit(pipe, number)
    if action == "direct":
        return pipe.transformer(torch.ones(1, 8))
    if action == "fail":
        pipe.transformer.fail = number % len(
            pipe.transformer.orders[pipe.transformer.calls % len(pipe.transformer.orders)]
        )
        with pytest.raises(FailureError):
            pipe()
        return None
    if action == "other steps":
        return pipe(number % 4)
    if action == "edit in a step":
        return pipe(callback=lambda pipe, step: edit(pipe, number) if step == 0 else None)
    return pipe()


ACTIONS = st.lists(
    st.tuples(st.sampled_from(("call", "edit", "direct", "fail", "other steps", "edit in a step")), st.integers(0, 50)),
    min_size=1,
    max_size=4,
)


@PLAIN
@given(case=pipelines(), actions=ACTIONS, mode=st.sampled_from((torch.no_grad, torch.inference_mode)))
def test_same_bits_without_a_race(case: Any, actions: Any, mode: Any) -> None:
    pipe, division, late = case
    plain = copy_of(pipe)
    with race_device(late) as device:
        device.adopt_all(pipe)
        before = state_of(pipe)
        put_on(pipe, division)
        for action, number in [*actions, ("call", 0)]:
            with mode():
                expected, found = act(plain, action, number, None), act(pipe, action, number, device)
            assert expected is None or torch.equal(expected, found), action
            assert not differing(values_of(plain), values_of(pipe)), action
        assert no_device_views(pipe)
        undo(pipe)
    assert state_of(pipe) == before
    assert not differing(values_of(plain), values_of(pipe))


@PLAIN
@given(case=pipelines(), place=st.integers(0, 60), error=st.sampled_from((KeyboardInterrupt, torch.OutOfMemoryError)))
def test_interrupted_anywhere(case: Any, place: int, error: type[BaseException]) -> None:
    """Ctrl-C while a copy is asked for, or memory that is not there: the next call is right."""
    pipe, division, late = case
    plain = copy_of(pipe)

    def fail(name: str) -> None:
        if device.steps == place and (error is KeyboardInterrupt or name == "allocate"):
            raise error

    with race_device(late) as device, torch.no_grad():
        device.adopt_all(pipe)
        before = state_of(pipe)
        put_on(pipe, division)
        device.steps, device.before_step = 0, fail
        with suppress(error):
            pipe()
        device.before_step = lambda name: None
        pipe.transformer.calls = pipe.text_encoder.calls = 0
        if pipe.controlnet is not None:
            pipe.controlnet.calls = 0
        assert no_device_views(pipe)
        assert not differing(values_of(plain), values_of(pipe))
        assert torch.equal(plain(), pipe())
        undo(pipe)
    assert state_of(pipe) == before


@settings(PLAIN, max_examples=5)
@given(case=pipelines())
def test_two_threads_take_turns(case: Any) -> None:
    pipe, division, late = case
    for net in pipe.modules.values():  # one order: the threads share the counter
        net.orders = [getattr(net, "orders", [()])[0]]
    with torch.no_grad():
        expected = pipe()
    found: list[Any] = []
    with race_device(late) as device:
        device.adopt_all(pipe)
        put_on(pipe, division)

        def run() -> None:
            try:
                with device.here(), torch.no_grad():
                    found.append(pipe())
            except BaseException as error:
                found.append(error)

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(isinstance(made, torch.Tensor) and torch.equal(made, expected) for made in found), found
