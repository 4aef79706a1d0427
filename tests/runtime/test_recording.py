"""A real call under a real plan, measured and kept; nothing is kept that would mislead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vramplan
from tests.support.calls import call_kwargs, output_tensor
from tests.support.store import own_store  # noqa: F401 - a fixture
from vramplan.calibration.records import CallRecord
from vramplan.calibration.store import read_store
from vramplan.errors import VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.units import GIB

CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))
BARE = Hardware(accelerators=(), host=MACHINE.host)
pytestmark = pytest.mark.usefixtures("own_store")


def applied(small_pipeline: Any, kind: str = "sd15-small") -> Any:
    pipe = small_pipeline(kind)
    names = ("height", "width", "num_frames", "num_inference_steps")
    sizes = {name: value for name, value in call_kwargs(kind).items() if name in names}
    vramplan.apply_plan(pipe, vramplan.plan(pipe, device=BARE, **sizes))
    return pipe


@pytest.mark.parametrize("kind", ["sd15-small", "flux-small", "cogvideox-small"])
def test_a_call_is_kept_with_what_it_took_and_changes_nothing(small_pipeline, kind: str) -> None:
    import torch

    plain = output_tensor(small_pipeline(kind)(**call_kwargs(kind)))
    pipe = applied(small_pipeline, kind)
    with vramplan.calibrating(pipe) as took:
        result = pipe(**call_kwargs(kind))
    assert torch.equal(output_tensor(result), plain)
    assert "progress_bar" not in vars(pipe)
    (record,) = read_store().records
    assert isinstance(record, CallRecord)
    assert (record.device, record.pipeline, record.settings) == ("cpu", type(pipe).__name__, "resident")
    assert record.basis == "assumed"
    assert record.measured.vram_reserved_bytes is None
    assert record.measured.seconds_per_call == took.seconds > 0
    assert record.measured.seconds_per_step is not None
    assert 0 < record.measured.seconds_per_step * (call_kwargs(kind)["num_inference_steps"] - 1) < took.seconds
    assert record.versions["torch"] == torch.__version__


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device whose peak the test sets, reset as torch resets it: by `memory.at_least(bytes)`."""
    import torch

    class Memory:
        highest = 0

        def at_least(self, size: int) -> None:
            self.highest = max(self.highest, size)

        def reset(self, device: str) -> None:
            self.highest = 0

    made = Memory()
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: made.highest)
    monkeypatch.setattr(torch.accelerator, "max_memory_reserved", lambda device: made.highest * 2)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", made.reset)
    return made


def on_a_card(small_pipeline: Any) -> Any:
    """A pipeline under a plan, which believes that it runs on a card."""
    pipe = applied(small_pipeline)
    vramplan.applied_to(pipe).device = "cuda:0"
    return pipe


def test_the_peaks_of_phases_are_told_apart_and_the_highest_is_the_calls(small_pipeline, memory: Any) -> None:
    pipe = on_a_card(small_pipeline)
    for module, size in ((pipe.text_encoder, 5), (pipe.unet, 20), (pipe.vae.decoder, 10)):
        module.register_forward_hook(lambda *_, size=size: memory.at_least(size))
    memory.at_least(99)  # by what was before
    with vramplan.calibrating(pipe) as took:
        pipe(**call_kwargs("sd15-small"))
    assert {name: peak.allocated_bytes for name, peak in took.phases.items()} == {
        "encode": 5,
        "denoise": 20,
        "decode": 10,
    }
    assert took.phases["denoise"].reserved_bytes == took.vram_reserved_bytes == 40
    assert took.vram_allocated_bytes == 20


def test_steps_are_told_apart_where_the_bar_itself_is_gone_through(small_pipeline, memory: Any) -> None:
    pipe = on_a_card(small_pipeline)
    with vramplan.calibrating(pipe) as took:
        memory.at_least(1)
        for number, _ in enumerate(pipe.progress_bar([1, 2, 3])):
            memory.at_least(10 + number)
        memory.at_least(3)
    assert [(name, peak.allocated_bytes) for name, peak in took.phases.items()] == [
        ("encode", 1),
        ("denoise", 12),
        ("decode", 3),
    ]
    assert took.seconds_per_step is not None


def test_of_several_bars_all_is_denoising_and_without_one_nothing_is_told_apart(small_pipeline, memory: Any) -> None:
    pipe = on_a_card(small_pipeline)
    with vramplan.calibrating(pipe) as took:
        for size in (4, 7):
            with pipe.progress_bar(total=1) as bar:
                memory.at_least(size)
                bar.update()
            memory.at_least(size + 1)
    assert [(name, peak.allocated_bytes) for name, peak in took.phases.items()] == [
        ("encode", 0),
        ("denoise", 7),
        ("decode", 8),
    ]
    with vramplan.calibrating(pipe) as took:
        pipe.progress_bar(total=1)
        memory.at_least(6)
    assert (took.phases, took.vram_allocated_bytes) == ({}, 6)


def test_a_prompt_encoded_before_by_encoders_that_are_gone_is_no_phase_of_the_call(small_pipeline, memory: Any) -> None:
    pipe = on_a_card(small_pipeline)
    pipe.text_encoder = None
    with vramplan.calibrating(pipe) as took:
        for _ in pipe.progress_bar([1]):
            memory.at_least(2)
    assert list(took.phases) == ["denoise", "decode"]


def test_without_a_plan_there_is_nothing_to_hold_it_against(small_pipeline) -> None:
    with (
        pytest.raises(VramplanError, match="no projection to hold it against"),
        vramplan.calibrating(small_pipeline("sd15-small")),
    ):
        pass


def test_a_call_that_fails_is_not_kept(small_pipeline) -> None:
    pipe = applied(small_pipeline)
    with pytest.raises(RuntimeError), vramplan.calibrating(pipe):
        raise RuntimeError("broken")
    assert read_store().records == ()
    assert "progress_bar" not in vars(pipe)


def test_a_plan_for_a_card_that_ran_on_the_cpu_is_not_kept(small_pipeline, monkeypatch) -> None:
    monkeypatch.setattr(Accelerator, "has_streams", property(lambda self: False))
    pipe = small_pipeline("sd15-small")
    vramplan.apply_plan(pipe, vramplan.plan(pipe, device=MACHINE, height=64, width=64), device="cpu")
    with vramplan.calibrating(pipe):
        pipe(**call_kwargs("sd15-small"))
    assert read_store().records == ()


def test_a_decode_in_smaller_pieces_is_not_the_plans(small_pipeline) -> None:
    pipe = applied(small_pipeline)
    told: list[str] = []
    with vramplan.calibrating(pipe, say=told.append):
        pipe.vae.enable_slicing()
    assert read_store().records == ()
    assert told == ["not kept for later plans: the call ran out of memory, and not all of it ran under the plan"]


def test_where_nothing_can_be_kept_the_call_counts_all_the_same(small_pipeline, own_store: Path) -> None:  # noqa: F811
    own_store.write_text("a file where the folder would be")
    pipe = applied(small_pipeline)
    told: list[str] = []
    with vramplan.calibrating(pipe, say=told.append):
        result = pipe(**call_kwargs("sd15-small"))
    assert output_tensor(result).shape[-1] == 64
    assert len(told) == 1
    assert "could not be kept" in told[0]
