"""A call that runs out of memory is made again under a smaller plan, and nothing of it is lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from make_pipeline import build

import vramplan
from tests.support.calls import call_kwargs, output_tensor
from vramplan.api.recover import recovering_call
from vramplan.errors import NothingFitsError, VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.runtime.applied import applied_to
from vramplan.simulator.tensor import SimTensor
from vramplan.units import GIB

CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))
SIZE = {"height": 64, "width": 64}


def planned() -> tuple[Any, Any]:
    pipe = build("flux-small")
    pipe.set_progress_bar_config(disable=True)
    return pipe, plan_for_all()


@cache
def plan_for_all() -> Any:
    return vramplan.plan(build("flux-small"), device=MACHINE, **SIZE)


@pytest.fixture(autouse=True)
def _no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands in for the card, and has no streams."""
    monkeypatch.setattr(Accelerator, "has_streams", property(lambda self: False))


def fails(module: Any, times: int, monkeypatch: pytest.MonkeyPatch, method: str = "forward") -> list[int]:
    """Let a module's method run out of memory so many times; the list counts its calls."""
    calls = [0]
    real = getattr(type(module), method)

    def sometimes(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(next(self.parameters()), SimTensor):
            return real(self, *args, **kwargs)  # planning anew simulates the call
        calls[0] += 1
        if calls[0] <= times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB\nmore text")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(module), method, sometimes)
    return calls


def test_denoising_that_runs_out_is_made_again_with_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, plan = planned()
    plain = output_tensor(pipe(**call_kwargs("flux-small")))
    vramplan.apply_plan(pipe, plan, device="cpu")
    fails(pipe.transformer, 1, monkeypatch)
    told: list[str] = []
    result = recovering_call(pipe, call_kwargs("flux-small"), say=told.append)
    assert torch.equal(output_tensor(result), plain)
    assert [line.split(" (")[0] for line in told[::2]] == ["out of memory"]
    assert "Tried to allocate 1.00 GiB); again within" in told[0]
    assert "more text" not in told[0]
    assert all(line.startswith("now ") for line in told[1::2])
    last = applied_to(pipe)
    assert last is not None
    assert last.plan.projected.vram_reserved_bytes <= plan.projected.vram_reserved_bytes * 0.9
    last.undo()
    assert torch.equal(output_tensor(pipe(**call_kwargs("flux-small"))), plain)


def test_a_decode_that_runs_out_keeps_the_denoising(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, plan = planned()
    vramplan.apply_plan(pipe, plan, device="cpu")
    decodes = fails(pipe.vae.decoder, 1, monkeypatch)
    steps = fails(pipe.transformer, 0, monkeypatch)
    told: list[str] = []
    result = recovering_call(pipe, call_kwargs("flux-small"), say=told.append)
    assert output_tensor(result).shape[-2:] == (64, 64)
    assert steps[0] == call_kwargs("flux-small")["num_inference_steps"]  # once, not twice
    assert decodes[0] > 1
    assert told == ["out of memory while decoding; the same latents again with vae_slicing"]
    assert "decode" not in vars(pipe.vae)
    applied = applied_to(pipe)
    assert applied is not None
    assert applied.plan == plan
    applied.undo()
    assert not pipe.vae.use_slicing


def test_a_decode_goes_down_to_the_smallest_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, plan = planned()
    vramplan.apply_plan(pipe, plan, device="cpu")
    fails(pipe.vae.decoder, 2, monkeypatch)
    told: list[str] = []
    recovering_call(pipe, call_kwargs("flux-small"), say=told.append)
    assert [line.rpartition("with ")[2].partition(":")[0] for line in told] == ["vae_slicing", "vae_tiling"]
    assert pipe.vae.use_tiling


def test_at_the_bottom_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, plan = planned()
    plain = output_tensor(pipe(**call_kwargs("flux-small")))
    vramplan.apply_plan(pipe, plan, device="cpu")
    with monkeypatch.context() as patched:
        fails(pipe.transformer, 1000, patched)
        with pytest.raises(NothingFitsError, match=r"nothing fits; the nearest candidate"):
            recovering_call(pipe, call_kwargs("flux-small"), say=lambda line: None)
    applied = applied_to(pipe)
    if applied is not None:
        applied.undo()
    assert torch.equal(output_tensor(pipe(**call_kwargs("flux-small"))), plain)


@pytest.mark.parametrize("error", [RuntimeError("some other thing"), KeyboardInterrupt()])
def test_other_errors_are_none_of_its_business(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, plan = planned()
    vramplan.apply_plan(pipe, plan, device="cpu")

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(type(pipe.transformer), "forward", broken)
    with pytest.raises(type(error)):
        recovering_call(pipe, call_kwargs("flux-small"))
    applied = applied_to(pipe)
    assert applied is not None
    assert applied.plan == plan
    assert "decode" not in vars(pipe.vae)


def test_metal_says_it_in_other_words_and_the_seed_may_be_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, plan = planned()
    arguments = call_kwargs("flux-small") | {"generator": None}
    torch.manual_seed(3)
    plain = output_tensor(pipe(**arguments))
    vramplan.apply_plan(pipe, plan, device="cpu")
    real: Callable[..., Any] = type(pipe.transformer).forward
    calls = [0]

    def once(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(next(self.parameters()), SimTensor):
            return real(self, *args, **kwargs)
        calls[0] += 1
        if calls[0] == 1:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "forward", once)
    told: list[str] = []
    torch.manual_seed(3)
    result = recovering_call(pipe, arguments, say=told.append)
    assert told[0].startswith("out of memory (MPS backend")
    assert torch.equal(output_tensor(result), plain)


def test_a_pipeline_without_a_plan_is_refused() -> None:
    with pytest.raises(VramplanError, match="has applied no plan"):
        recovering_call(build("sd15-small"), {})


class TestThePipelinesOwnCall:
    """`auto_configure(pipe, recover=True)`: from then on `pipe(...)` recovers, until the plan is undone."""

    def configured(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        pipe = build("flux-small")
        pipe.set_progress_bar_config(disable=True)
        monkeypatch.setattr(Accelerator, "device", property(lambda self: "cpu"))
        vramplan.auto_configure(pipe, device=MACHINE, recover=True, **SIZE)
        return pipe

    def test_it_recovers_and_goes_on_recovering(self, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        plain = build("flux-small")
        plain.set_progress_bar_config(disable=True)
        cls = type(plain)
        wanted = output_tensor(plain(**call_kwargs("flux-small")))
        pipe = self.configured(monkeypatch)
        before, recovers = applied_to(pipe), type(pipe).__call__
        with monkeypatch.context() as patched:
            fails(pipe.transformer, 1, patched)
            assert torch.equal(output_tensor(pipe(**call_kwargs("flux-small"))), wanted)
        assert "out of memory" in capsys.readouterr().out
        assert applied_to(pipe) is not before
        assert type(pipe).__call__ is recovers
        assert type(plain) is cls
        assert torch.equal(output_tensor(pipe(**call_kwargs("flux-small"))), wanted)
        assert type(pipe).__call__ is recovers

    def test_undo_gives_the_untouched_call_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cls = type(build("flux-small"))
        own = cls.__call__
        pipe = self.configured(monkeypatch)
        assert isinstance(pipe, cls)
        assert type(pipe).__name__ == cls.__name__
        assert cls.__call__ is own
        applied = applied_to(pipe)
        assert applied is not None
        applied.undo()
        assert type(pipe) is cls
        fails(pipe.transformer, 1, monkeypatch)
        with pytest.raises(torch.OutOfMemoryError):
            pipe(**call_kwargs("flux-small"))

    def test_arguments_by_position_are_those_of_the_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = self.configured(monkeypatch)
        told = call_kwargs("flux-small")
        wanted = output_tensor(pipe(**told))
        told = call_kwargs("flux-small")
        assert torch.equal(output_tensor(pipe(told.pop("prompt"), **told)), wanted)
        with pytest.raises(TypeError, match="unexpected keyword"):
            pipe(prompt="a", nonsense=1)

    def test_configuring_again_without_it_takes_it_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cls = type(build("flux-small"))
        pipe = self.configured(monkeypatch)
        vramplan.auto_configure(pipe, device=MACHINE, **SIZE)
        assert type(pipe) is cls

    def test_where_configuring_again_fails_it_goes_on_recovering(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = self.configured(monkeypatch)
        cls, earlier = type(pipe), applied_to(pipe)
        with pytest.raises(NothingFitsError):
            vramplan.auto_configure(pipe, device=MACHINE, vram="1MiB", **SIZE)
        assert type(pipe) is cls
        assert applied_to(pipe) is earlier

    def test_it_is_saved_under_its_own_name_and_can_be_copied(self, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
        import json

        cls = type(build("flux-small"))
        pipe = self.configured(monkeypatch)
        pipe.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == cls.__name__


def test_what_was_fixed_by_hand_is_kept_by_the_smaller_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("flux-small")
    pipe.set_progress_bar_config(disable=True)
    fixed = {"decode": "vae_slicing", "placement.vae": "resident"}
    plan = vramplan.plan(pipe, device=MACHINE, settings=fixed, **SIZE)
    assert plan.asked.settings == {key: (value,) for key, value in fixed.items()}
    vramplan.apply_plan(pipe, plan, device="cpu")
    fails(pipe.transformer, 1, monkeypatch)
    recovering_call(pipe, call_kwargs("flux-small"), say=lambda line: None)
    last = applied_to(pipe)
    assert last is not None
    assert last.plan != plan
    assert last.plan.settings.decode == ("vae_slicing",)
    assert last.plan.settings.placement["vae"] == "resident"
    assert last.plan.asked == plan.asked


@pytest.mark.parametrize("kind", ["sd15-small", "flux-small"])
def test_encoders_that_are_gone_are_not_planned_for_again(
    kind: str, small_folder: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vramplan.runtime.call import call_arguments
    from vramplan.runtime.staged import load_applied

    folder = small_folder(kind)
    plan = vramplan.plan(str(folder), device=MACHINE, settings={"placement.text_encoder": "encode_first"}, **SIZE)

    def load() -> Any:
        def arguments(pipe: Any) -> Any:
            return call_arguments(pipe, plan, "a fox", seed=1) | {"output_type": "pt", "num_inference_steps": 2}

        return load_applied(plan, folder, arguments, device="cpu", say=lambda line: None)

    plain = output_tensor(load()())
    loaded = load()
    pipe = loaded.applied.pipe
    fails(pipe.components.get("unet") or pipe.transformer, 1, monkeypatch)
    told: list[str] = []
    with loaded.checking_encodings():
        result = recovering_call(pipe, loaded.arguments, say=told.append)
    assert torch.equal(output_tensor(result), plain)
    assert told[0].startswith("out of memory")
    last = applied_to(pipe)
    assert last is not None
    assert not any("text_encoder" in name for name in last.plan.settings.placement)
    assert last.plan.projected.vram_reserved_bytes < plan.projected.vram_reserved_bytes
    assert not any("placement.text_encoder" in key for key in last.plan.asked.settings)
