"""Compiled blocks whose weights are streamed: the bits of compiled blocks, no graph twice, and what is refused."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import vramplan
from tests.streaming.test_join import MACHINE, _cpu_as_card  # noqa: F401
from tests.streaming.test_pipelines import made, result, undo
from vramplan.errors import VramplanError
from vramplan.pipeline.compiled import streaming_refusal
from vramplan.streaming.attach import stream_of, stream_weights

INDUCTOR = os.environ.get("VRAMPLAN_TESTS") == "all" and shutil.which("g++") is not None
STREAMED: dict[str, Any] = {"transformer": {"streamed": 3, "locked": 3}, "text_encoder_2": {}, "vae": {}}


@pytest.fixture(autouse=True)
def _compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo and AOTAutograd; with VRAMPLAN_TESTS=all Inductor compiles C++ too."""
    torch._dynamo.reset()
    if not INDUCTOR:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(("first", "fullgraph"), [("compiled", True), ("streamed", True), ("streamed", False)])
def test_the_bits_are_those_of_compiled_blocks(first: str, fullgraph: bool) -> None:
    pipe, call = made("flux-small")
    plain = [result(pipe, call) for _ in range(2)]
    pipe.transformer.compile_repeated_blocks(fullgraph=fullgraph)
    expected = [result(pipe, call) for _ in range(2)]
    alone = graphs()
    assert alone
    pipe, call = made("flux-small")
    deeds: list[Callable[[], Any]] = [
        lambda: pipe.transformer.compile_repeated_blocks(fullgraph=fullgraph),
        lambda: stream_weights(pipe, "cpu", **STREAMED),
    ]
    for deed in deeds if first == "compiled" else reversed(deeds):
        deed()
    torch._dynamo.reset()
    counters.clear()
    assert torch.equal(result(pipe, call), expected[0])
    made_graphs = graphs()
    assert made_graphs <= alone
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert torch.equal(result(pipe, call), expected[1])
    assert graphs() == made_graphs
    blocks = stream_of(pipe.transformer).member.blocks
    assert all(block.buffer is None for block in blocks)
    undo(pipe)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(result(pipe, call), expected[0])
    assert graphs() == made_graphs
    for block in pipe.transformer.transformer_blocks:
        block._compiled_call_impl = None
    torch.testing.assert_close(plain[0], expected[0], rtol=1e-3, atol=1e-3)


def test_copies_of_compiled_blocks_are_plain() -> None:
    pipe, call = made("flux-small")
    expected = result(pipe, call)
    pipe.transformer.compile_repeated_blocks()
    stream_weights(pipe, "cpu", **STREAMED)
    result(pipe, call)
    copied = copy.deepcopy(pipe.transformer)
    assert all(child._compiled_call_impl is None for child in copied.modules())
    undo(pipe)
    pipe.transformer = copied
    assert torch.equal(result(pipe, call), expected)


@pytest.mark.usefixtures("_cpu_as_card")
def test_a_plan_streams_what_it_compiles_and_undoes_both() -> None:
    pipe, call = made("flux-small")
    expected = result(pipe, call)
    settings = {
        "placement.transformer": "weight_streaming:streamed=3",
        "compile.transformer": "compile_repeated_blocks",
    }
    plan = vramplan.plan(pipe, device=MACHINE, settings=settings, simulate=False)
    applied = vramplan.apply_plan(pipe, plan, device="cpu")
    assert all(block._compiled_call_impl is not None for block in pipe.transformer.transformer_blocks)
    planned = result(pipe, call)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(result(pipe, call), planned)
    applied.undo()
    assert all(child._compiled_call_impl is None for child in pipe.transformer.modules())
    assert torch.equal(result(pipe, call), expected)


def whole(pipe: Any) -> None:
    pipe.transformer.compile()


def wrapped(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer)


def forward(pipe: Any) -> None:
    pipe.transformer.forward = torch.compile(pipe.transformer.forward)


def list_of_blocks(pipe: Any) -> None:
    pipe.transformer.single_transformer_blocks.compile()


def graph_mode(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(mode="reduce-overhead", backend="inductor")


def graph_option(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].compile(options={"triton.cudagraphs": True}, backend="inductor")


def graph_backend(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].compile(backend="cudagraphs")


def graph_of_a_layer(pipe: Any) -> None:
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.to_q = torch.compile(attention.to_q, mode="max-autotune", backend="inductor")


def frozen(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(options={"freezing": True}, backend="inductor")


REFUSED = {
    "as a whole": (whole, wrapped, forward, list_of_blocks),
    "CUDA graphs": (graph_mode, graph_option, graph_backend, graph_of_a_layer),
    "frozen": (frozen,),
}


@pytest.mark.usefixtures("_cpu_as_card")
@pytest.mark.parametrize(
    ("reason", "deed"),
    [(reason, deed) for reason, deeds in REFUSED.items() for deed in deeds],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_would_keep_addresses_or_hooks_is_refused(reason: str, deed: Callable[[Any], None]) -> None:
    pipe, _ = made("flux-small")
    assert streaming_refusal(pipe.transformer) is None
    deed(pipe)
    with pytest.raises(VramplanError, match=reason):
        stream_weights(pipe, "cpu", transformer={"streamed": 3})
    settings = {"placement.transformer": "weight_streaming:streamed=3"}
    with pytest.raises(VramplanError, match=reason):
        vramplan.plan(pipe, device=MACHINE, settings=settings, simulate=False)
    assert stream_of(pipe.transformer) is None


def test_graphs_of_the_whole_process_are_seen() -> None:
    pipe, _ = made("flux-small")
    pipe.transformer.compile_repeated_blocks(backend="inductor")
    assert streaming_refusal(pipe.transformer) is None
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        assert "CUDA graphs" in str(streaming_refusal(pipe.transformer))


def test_graphs_that_come_while_streamed_are_refused_in_the_next_call() -> None:
    pipe, call = made("flux-small")
    stream_weights(pipe, "cpu", transformer={"streamed": 3})
    graph_mode(pipe)
    with pytest.raises(VramplanError, match="CUDA graphs"):
        result(pipe, call)
