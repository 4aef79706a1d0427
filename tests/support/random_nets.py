"""Small pipelines of random modules, of which hypothesis draws sizes, ties, orders and failures."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from vramplan.streaming.attach import ATTACHED, detach, stream_weights
from vramplan.streaming.tensors import Leaf

WIDTH = 8


class Layer(torch.nn.Module):
    """A matrix, a bias and a buffer that is not saved."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.into = torch.nn.Linear(WIDTH, hidden)
        self.out = torch.nn.Linear(hidden, WIDTH, bias=False)
        self.register_buffer("scale", torch.rand(WIDTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.into(x))) * self.scale


class Unit(torch.nn.Module):
    """A block: layers, one after the other, one of them called twice."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.first = Layer(sizes[0])
        for number, size in enumerate(sizes[1:]):
            self.add_module(f"more{number}", Layer(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = x + layer(x)
        return x + self.first(x)


class FailureError(Exception):
    """Raised in a forward on demand."""


class Net(torch.nn.Module):
    """Blocks between weights outside of blocks, run in an order that may differ from forward to forward."""

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        self.head = torch.nn.Linear(WIDTH, WIDTH)
        self.shift = torch.nn.Parameter(torch.randn(WIDTH))
        self.blocks = torch.nn.ModuleList(Unit(sizes) for sizes in spec.sizes)
        self.tail = torch.nn.Linear(WIDTH, WIDTH)
        if spec.tied:
            self.tail.weight = self.head.weight
            if len({len(sizes) for sizes in spec.sizes}) >= 1 and len(spec.sizes) > 1:
                self.blocks[-1].first.scale = self.blocks[0].first.scale
        self.orders = spec.orders
        self.calls = 0
        self.fail: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = self.orders[self.calls % len(self.orders)]
        self.calls += 1
        x = self.head(x) + self.shift
        for number, place in enumerate(order):
            if self.fail == number:
                self.fail = None
                raise FailureError
            x = torch.sin(self.blocks[place % len(self.blocks)](x))
        return self.tail(x)


class Auto(torch.nn.Module):
    """A component that is called by a method."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = torch.nn.Linear(WIDTH, WIDTH)
        self.decoder = Unit([12, 3])

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.quant(x))


@dataclass(frozen=True, slots=True, kw_only=True)
class NetSpec:
    """A network: hidden sizes of the layers of each block, whether weights are tied, the order of each forward."""

    sizes: Sequence[Sequence[int]]
    tied: bool
    orders: Sequence[Sequence[int]]


class Pipe:
    """A pipeline: a text encoder, two networks in a loop, and a VAE."""

    def __init__(self, text: NetSpec, control: NetSpec | None, net: NetSpec) -> None:
        self.text_encoder = Net(text)
        self.controlnet = None if control is None else Net(control)
        self.transformer = Net(net)
        self.vae = Auto()
        for module in self.modules.values():
            module.eval()

    @property
    def components(self) -> dict[str, Any]:
        names = ("text_encoder", "controlnet", "transformer", "vae")
        return {name: getattr(self, name) for name in names}

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """The components that it has."""
        return {name: module for name, module in self.components.items() if module is not None}

    def __call__(self, steps: int = 2, callback: Any = None) -> torch.Tensor:
        x = self.text_encoder(torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH))
        for step in range(steps):
            if self.controlnet is not None:
                x = x + self.controlnet(x)
            x = self.transformer(x)
            if callback is not None:
                callback(self, step)
        return self.vae.decode(x)

    def to(self, *args: Any, **kwargs: Any) -> Pipe:
        for module in self.modules.values():
            module.to(*args, **kwargs)
        return self


def copy_of(pipe: Pipe) -> Pipe:
    """An untouched pipeline with the same weights, made of other memory."""
    return copy.deepcopy(pipe)


def state_of(pipe: Pipe) -> dict[str, Any]:
    """All that streaming must leave as it was: tensors, attributes, hooks and classes."""
    found: dict[str, Any] = {}
    for name, root in pipe.modules.items():
        for path, module in root.named_modules():
            place = f"{name}.{path}"
            found[f"{place} class"] = type(module)
            found[f"{place} attributes"] = sorted(vars(module))
            found[f"{place} hooks"] = len(module._forward_pre_hooks) + len(module._forward_hooks)
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                found[f"{place}.{key}"] = id(tensor)
    return found | {"class": type(pipe), "attributes": sorted(vars(pipe))}


def values_of(pipe: Pipe) -> dict[str, torch.Tensor]:
    """The values of all tensors now."""
    return {
        f"{name}.{path}": tensor.detach().clone()
        for name, root in pipe.modules.items()
        for path, tensor in (*root.named_parameters(), *root.named_buffers())
    }


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """The names of tensors whose bits differ."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def undo(pipe: Pipe) -> None:
    """Take the plan off."""
    from vramplan.pipeline.own_class import take_class

    for module in pipe.modules.values():
        detach(module)
    take_class(pipe)


def put_on(pipe: Pipe, division: dict[str, dict[str, int]]) -> None:
    """Stream these components."""
    stream_weights(pipe, "cpu", **{name: options for name, options in division.items() if name in pipe.modules})


def no_device_views(pipe: Pipe) -> bool:
    """Whether every weight in the cache is its master."""
    streams = [vars(module).get(ATTACHED) for module in pipe.modules.values()]
    blocks = [block for stream in streams if stream is not None for block in stream.member.blocks]
    return all(
        block.buffer is None and type(leaf) is Leaf and leaf.tensor.data_ptr() == masters[0].data_ptr()
        for block in blocks
        for leaf, masters in zip(block.leaves, block.masters, strict=True)
    )


@st.composite
def net_specs(draw: Any, most: int = 6) -> NetSpec:
    """Networks of up to so many blocks."""
    count = draw(st.integers(1, most))
    sizes = [draw(st.lists(st.sampled_from((1, 5, 16, 40)), min_size=1, max_size=3)) for _ in range(count)]
    usual = list(range(count))
    order = st.one_of(
        st.just(usual),
        st.permutations(usual),
        st.lists(st.integers(0, count - 1), min_size=1, max_size=count + 2),
    )
    return NetSpec(sizes=sizes, tied=draw(st.booleans()), orders=draw(st.lists(order, min_size=1, max_size=3)))


@st.composite
def divisions(draw: Any, pipe: Pipe) -> dict[str, dict[str, int]]:
    """Options of streaming for some of the pipeline's components."""
    from vramplan.pipeline.geometry import module_bytes, units_of
    from vramplan.streaming.division import worth_streaming

    found = {}
    for name, module in pipe.modules.items():
        if name != "transformer" and not draw(st.booleans()):
            continue
        sizes = [] if name == "vae" else [module_bytes(unit) for unit in units_of(module)]
        streamed = draw(st.integers(0, len(worth_streaming(sizes))))
        keep = draw(st.integers(0, len(sizes) - streamed))
        found[name] = {"streamed": streamed, "keep": keep, "locked": draw(st.integers(0, len(sizes) - keep + 1))}
    return found
