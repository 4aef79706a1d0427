"""Weight streaming on real small pipelines of many kinds: the same bits, from copies alone, and all undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.families import FAMILIES, make_family, wan_parts
from tests.support.one_thread import _one_thread  # noqa: F401
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.modules import modules_of, pipes_of
from vramplan.pipeline.own_class import take_class
from vramplan.pipeline.types import Component
from vramplan.simulator.run import call_inputs
from vramplan.strategies.weight_streaming import LEAST_STREAMED, streaming_sizes
from vramplan.streaming.attach import detach, stream_of, stream_weights
from vramplan.streaming.backend import DirectBackend
from vramplan.streaming.division import worth_streaming

Numbers = dict[str, int]
NAMES = (
    "sdxl-controlnet",  # two encoders, a ControlNet beside the UNet
    "sdxl-adapter",  # an adapter that runs once
    "sd3",  # three encoders
    "qwen-image",  # a language model that sees
    "kolors",  # ChatGLM
    "stable-cascade",  # two denoisers in two pipelines
    "kandinsky-2.2",  # a prior, pipelines combined
    "dit",  # its last layer calls a part of its first block
    "deep-floyd",  # no VAE
    "sana",  # a denoiser of linear attention
    "stable-video",  # a picture in place of a prompt
    "animate-diff",  # motion modules in a UNet
    "hunyuan-video",  # two lists of blocks
    "wan-2.2",  # two denoisers in turn
    "stable-audio",  # weight_norm in the VAE
)


def all_streamed(component: Component) -> Numbers:
    return {"streamed": streamable(component)}


def half_streamed(component: Component) -> Numbers:
    most = streamable(component)
    streamed = min(max(most // 2, LEAST_STREAMED), most)
    others = len(streaming_sizes(component)) - streamed
    return {"streamed": streamed, "keep": others // 2, "locked": (streamed + others + 1) // 2}


def by_phase(component: Component) -> Numbers:
    return {}


def streamable(component: Component) -> int:
    found = len(worth_streaming(streaming_sizes(component)))
    return found if found >= LEAST_STREAMED else 0


class CopiesOnly(TorchDispatchMode):
    """Raises where a kernel reads a weight of the cache in host memory: on a card it would fail."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.copying = False
        streams = [stream for module in modules_of(pipe).values() if (stream := stream_of(module))]
        self.masters = {
            tensor.untyped_storage().data_ptr(): block.name
            for stream in streams
            for block in stream.member.blocks
            for tensor in block.tensors
            if tensor.numel()
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.copying and not func.is_view:
            for given in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(given, torch.Tensor):
                    name = self.masters.get(given.untyped_storage().data_ptr())
                    assert name is None, f"{func} reads {name} in host memory"
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager: the copies of the engine itself may read."""
        real = {name: getattr(DirectBackend, name) for name in ("copy", "gather")}

        def free(name: str) -> Callable[..., None]:
            def copy(backend: Any, *args: Any) -> None:
                self.copying = True
                try:
                    real[name](backend, *args)
                finally:
                    self.copying = False

            return copy

        with patch.multiple(DirectBackend, **{name: free(name) for name in real}), self:
            yield


@cache
def pipeline(name: str) -> Any:
    if name != "wan-2.2":
        return make_family(name)
    torch.manual_seed(0)
    second = wan_parts()["transformer"]
    pipe = diffusers.WanPipeline(**wan_parts(), transformer_2=second, boundary_ratio=0.9)
    for module in modules_of(pipe).values():
        module.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def output(name: str) -> torch.Tensor:
    pipe = pipeline(name)
    workload = FAMILIES["wan" if name == "wan-2.2" else name].workload
    workload = replace(workload, num_frames=min(workload.num_frames, 5 if name == "wan-2.2" else 2))
    result = pipe(**call_inputs(pipe, workload) | {"generator": torch.Generator().manual_seed(3)})
    found = next(getattr(result, kind) for kind in ("images", "frames", "audios") if hasattr(result, kind))
    return torch.as_tensor(found).nan_to_num(7.0)  # weights at random: some give no number


plain = cache(output)


@contextmanager
def mapped(pipe: Any, folder: Path) -> Iterator[None]:
    """Context manager: weights are pages of a safetensors file, as `from_pretrained` leaves them."""
    weights = {str(id(each)): each for module in modules_of(pipe).values() for each in module.parameters()}
    kept = {key: each.data for key, each in weights.items()}
    save_file({key: data.clone().contiguous() for key, data in kept.items()}, folder / "weights.safetensors")
    with safe_open(folder / "weights.safetensors", "pt") as file:
        for key in kept:
            weights[key].data = file.get_tensor(key)
    yield
    for key, data in kept.items():
        weights[key].data = data


def state(pipe: Any) -> list[Any]:
    """Every tensor and attribute of the pipeline's modules, as objects, and the classes."""
    children = [child for module in modules_of(pipe).values() for child in module.modules()]
    own = [
        {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(child).items()
            if key in ("forward", "_apply") or key.startswith("_vramplan") or key.endswith(("_hooks", "eters", "fers"))
        }
        for child in children
    ]
    named = [[(key, *map(id, v.values())) if isinstance(v, dict) else key for key, v in each.items()] for each in own]
    return [named, [type(thing) for thing in (*children, *pipes_of(pipe))]]


@pytest.mark.parametrize("form", [all_streamed, half_streamed, by_phase])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_from_copies_alone(name: str, form: Callable[[Component], Numbers], tmp_path: Path) -> None:
    pipe, expected = pipeline(name), plain(name)
    modules = modules_of(pipe)
    numbers = {part: form(describe_component(part, module, pipeline=type(pipe))) for part, module in modules.items()}
    before = state(pipe)
    with mapped(pipe, tmp_path):
        stream_weights(pipe, "cpu", **numbers)
        try:
            with CopiesOnly(pipe).watching():
                streamed = output(name)
        finally:
            for part in modules.values():
                detach(part)
            for part in pipes_of(pipe):
                take_class(part)
    assert torch.equal(streamed, expected)
    assert state(pipe) == before
