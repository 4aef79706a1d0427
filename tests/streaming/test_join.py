"""Components that share a cache, those beside it, how both are called, and what is left on a pipeline afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from make_pipeline import build

import vramplan
import vramplan.runtime.applied
from tests.support.calls import call_kwargs
from tests.support.families import FAMILIES, make_family
from vramplan.api.recover import make_recovering
from vramplan.errors import VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.modules import modules_of, pipes_of
from vramplan.pipeline.own_class import plain_class, take_class
from vramplan.simulator.run import call_inputs
from vramplan.strategies.weight_streaming import WeightStreaming
from vramplan.streaming.attach import attach, detach, running, stream_of, stream_weights
from vramplan.streaming.cache import Other
from vramplan.units import GIB

CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))


@pytest.fixture(autouse=True)
def _cpu_as_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vramplan.runtime.applied, "planned_accelerator", lambda *_: CARD)


def flux() -> Any:
    pipe = build("flux-small")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def streamed_plan(pipe: Any, **fixed: str) -> Any:
    settings = {f"placement.{name}": "weight_streaming" for name in modules_of(pipe)}
    return vramplan.plan(pipe, device=MACHINE, settings=settings | fixed, simulate=False)


def hooks(pipe: Any) -> Iterator[Any]:
    for module in modules_of(pipe).values():
        for child in module.modules():
            yield from child._forward_pre_hooks.values()
            yield from child._forward_hooks.values()


def watchers(module: torch.nn.Module) -> int:
    return sum(isinstance(hook, Other) for child in module.modules() for hook in child._forward_pre_hooks.values())


def own_classes(pipe: Any) -> list[str]:
    children = [child for module in modules_of(pipe).values() for child in module.modules()]
    return [type(thing).__name__ for thing in (*pipes_of(pipe), *children) if type(thing) is not plain_class(thing)]


def test_components_attached_one_by_one_do_not_watch_each_other() -> None:
    pipe = flux()
    for number, name in enumerate(modules_of(pipe)):
        stream_weights(pipe, "cpu", **{name: {"locked": number}})
    assert len({id(stream_of(module).cache) for module in modules_of(pipe).values()}) == 1
    assert not any(watchers(module) for module in modules_of(pipe).values())
    for module in modules_of(pipe).values():
        detach(module)
    assert not list(hooks(pipe))


def test_a_component_attached_again_is_still_told_of_others() -> None:
    pipe = flux()
    stream_weights(pipe, "cpu", transformer={})
    watched = watchers(pipe.vae)
    assert watched
    pipe.transformer.transformer_blocks[0].register_buffer("late", torch.zeros(3))
    with running(pipe):
        assert watchers(pipe.vae) == watched
        pipe.transformer.x_embedder(torch.zeros(1, pipe.transformer.config.in_channels))
        member = stream_of(pipe.transformer).member
        assert member.rest.buffer is not None
        pipe.vae.decode(torch.zeros(1, pipe.vae.config.latent_channels, 4, 4))
        assert all(block.buffer is None for block in member.blocks)
    detach(pipe.transformer)
    assert not list(hooks(pipe))


def test_an_encoder_leaves_when_a_denoiser_outside_of_the_cache_runs() -> None:
    pipe = flux()
    stream_weights(pipe, "cpu", text_encoder_2={}, vae={})
    encoder, seen = stream_of(pipe.text_encoder_2).member, []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda *_: seen.append([block.name for block in encoder.blocks if block.buffer is not None])
    )
    pipe(**call_kwargs("flux-small"))
    handle.remove()
    assert seen
    assert not any(seen)
    for module in modules_of(pipe).values():
        detach(module)
    assert not list(hooks(pipe))


def test_a_loop_component_in_the_cache_stays_while_another_one_runs() -> None:
    pipe = make_family("sdxl-controlnet")
    stream_weights(pipe, "cpu", controlnet={}, vae={})
    controlnet, seen = stream_of(pipe.controlnet).member, []
    handle = pipe.unet.register_forward_pre_hook(
        lambda *_: seen.append(all(block.buffer is not None for block in controlnet.blocks))
    )
    workload = FAMILIES["sdxl-controlnet"].workload
    pipe(**call_inputs(pipe, workload))
    handle.remove()
    assert seen
    assert all(seen)
    for module in modules_of(pipe).values():
        detach(module)
    take_class(pipe)


def test_undoing_gives_the_parts_of_a_combined_pipeline_their_classes_back() -> None:
    pipe = make_family("kandinsky-2.2")
    applied = vramplan.apply_plan(pipe, streamed_plan(pipe), device="cpu")
    assert len(own_classes(pipe)) == len(modules_of(pipe)) + 3
    applied.undo()
    assert not own_classes(pipe)


def test_a_plan_that_cannot_be_applied_leaves_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = flux()
    plan, real = streamed_plan(pipe), WeightStreaming.apply

    def fail(*args: Any) -> None:
        real(*args)
        raise VramplanError("no")

    monkeypatch.setattr(WeightStreaming, "apply", fail)
    with pytest.raises(VramplanError, match=r"^no$"):
        vramplan.apply_plan(pipe, plan, device="cpu")
    assert not own_classes(pipe)
    assert not list(hooks(pipe))


def test_a_call_that_recovers_is_a_streamed_call_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = flux()
    applied = vramplan.apply_plan(pipe, streamed_plan(pipe), device="cpu")
    make_recovering(pipe)
    for _ in range(2):
        pipe(**call_kwargs("flux-small"))
        assert all(block.buffer is None for block in stream_of(pipe.vae).member.blocks)
        with pytest.raises(VramplanError, match="streamed under a plan"):
            pipe.to("cpu")
    applied.undo()
    assert pipe.to("cpu") is pipe
    assert not own_classes(pipe)


class Scaled(torch.nn.Module):
    """A VAE whose methods read a weight before any submodule runs, and one that its forward does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("std", torch.full((4,), 2.0))

    def decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, int]:
        return latents * self.std, self.std.data_ptr()

    def normalized(self, latents: torch.Tensor) -> tuple[torch.Tensor, int]:
        return latents * self.std, self.std.data_ptr()


@pytest.mark.parametrize("method", ["decode", "normalized"])
def test_methods_that_read_weights_bring_them(method: str) -> None:
    vae = Scaled()
    master = vae.std.data_ptr()
    attach(vae, "vae", "cpu")
    scaled, read = getattr(vae, method)(torch.ones(4))
    assert scaled.tolist() == [2.0] * 4
    assert read != master
    detach(vae)
    assert getattr(vae, method)(torch.ones(4))[1] == master
    assert type(vae) is Scaled


class Looking(FluxPipeline):
    """A pipeline that looks where its weights are."""

    def _get_execution_device(self) -> torch.device:
        return next(self.transformer.parameters()).device


def test_every_way_to_ask_for_the_device_names_that_of_the_cache() -> None:
    pipe = Looking(**build("flux-small").components)
    stream_weights(pipe, "meta", transformer={})
    assert {pipe.device, pipe._execution_device, pipe._get_execution_device()} == {torch.device("meta")}
    assert pipe.transformer.device == torch.device("meta")
    detach(pipe.transformer)
    assert {pipe.device, pipe._execution_device, pipe._get_execution_device()} == {torch.device("cpu")}
