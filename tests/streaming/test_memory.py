"""Host memory of streamed weights: page-locked chunks without waste, refusals, and weights that are quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.race_device import race_device
from tests.support.random_nets import NetSpec, Pipe, copy_of, put_on, undo
from vramplan.pipeline.geometry import units_of
from vramplan.streaming.attach import attach, detach, stream_of
from vramplan.streaming.backend import DirectBackend, TorchBackend
from vramplan.streaming.locking import page_lock
from vramplan.streaming.tensors import Block


class Counting(DirectBackend):
    """A backend whose page-locked memory is counted and has no bytes."""

    def __init__(self) -> None:
        super().__init__(torch.device("meta"))
        self.chunks: list[int] = []

    def page_lock(self, size: int, owner: str) -> torch.Tensor:
        self.chunks.append(size)
        return torch.empty(size, dtype=torch.uint8, device="meta")


# Transformers of bundled profiles, as their configuration files have them.
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "Wan 2.1 14B": ("WanTransformer3DModel", {}),
    "SDXL": (
        "UNet2DConditionModel",
        {
            "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "use_linear_projection": True,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("name", sorted(LARGE))
def test_page_locked_chunks_waste_at_most_two_percent(name: str, share: float) -> None:
    import diffusers

    cls, config = LARGE[name]
    with torch.device("meta"):
        module = getattr(diffusers, cls)(**config).to(torch.bfloat16)
    blocks = [Block(str(place), list(unit.parameters())) for place, unit in enumerate(units_of(module))]
    blocks = blocks[: max(1, int(len(blocks) * share))]
    backend = Counting()
    assert page_lock(backend, blocks, name) is None  # type: ignore[arg-type]
    assert max(len(block.segments) for block in blocks) <= 8
    assert sum(backend.chunks) <= 1.02 * sum(block.size for block in blocks)
    assert all(size & (size - 1) == 0 for size in backend.chunks)


def small_pipe() -> Pipe:
    torch.manual_seed(0)
    net = NetSpec(sizes=[[400], [40, 400], [800], [400]], tied=False, orders=[[0, 1, 2, 3]])
    return Pipe(NetSpec(sizes=[[4]], tied=True, orders=[[0]]), None, net)


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_refused_page_locking_is_noted(allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses after some chunks: those blocks stay in pageable memory, stages too if there is nothing."""
    monkeypatch.setattr("vramplan.streaming.locking._LEAST_CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr("vramplan.streaming.locking._CHUNK_BYTES", 1 << 14)
    pipe = small_pipe()
    plain = copy_of(pipe)
    with race_device() as device, torch.no_grad():
        device.adopt_all(pipe)
        lock, locked = device.page_lock, []

        def refuse(size: int) -> torch.Tensor:
            if len(locked) == allowed:
                raise RuntimeError("CUDA error: out of memory\nCompile with...")
            locked.append(size)
            return lock(size)

        monkeypatch.setattr(device, "page_lock", refuse)
        put_on(pipe, {"transformer": {"streamed": 3, "locked": 4}})
        stream = stream_of(pipe.transformer)
        assert stream is not None
        assert stream.member is not None
        assert len(stream.cache.notes) == 1
        assert "could not be page-locked (CUDA error: out of memory)" in stream.cache.notes[0]
        assert sum(bool(block.segments) for block in stream.member.blocks) < 5
        assert torch.equal(pipe(), plain())
        assert torch.equal(pipe(), plain())
        undo(pipe)


def test_failing_read_leaves_the_pipeline_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk error in the copier thread: the call fails with it, the next is right."""
    pipe = small_pipe()
    plain = copy_of(pipe)
    with race_device() as device, torch.no_grad():
        device.adopt_all(pipe)
        put_on(pipe, {"transformer": {"streamed": 3}})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TorchBackend, "_gather", lambda *_: (_ for _ in ()).throw(OSError("disk")))
            with pytest.raises(OSError, match="disk"):
                pipe()
        assert torch.equal(pipe(), plain())
        undo(pipe)


def test_adapters_do_not_lock_weights_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what came is page-locked when a component is attached anew."""
    pipe = small_pipe()
    with race_device() as device, torch.no_grad():
        device.adopt_all(pipe)
        put_on(pipe, {"transformer": {"streamed": 3, "locked": 4}})
        before = [parameter.data_ptr() for parameter in pipe.transformer.parameters()]
        used = device.locked.used
        pipe.transformer.blocks[1].first.lora = torch.nn.Linear(8, 8)
        expected = copy_of(pipe)()
        assert torch.equal(pipe(), expected)
        after = {parameter.data_ptr() for parameter in pipe.transformer.parameters()}
        assert set(before) <= after
        assert device.locked.used - used <= 1 << 20
        undo(pipe)
        assert torch.equal(pipe(), expected)


# ---- quantized weights


class Stack(torch.nn.Module):
    """Linear layers in blocks."""

    def __init__(self, blocks: int = 4, width: int = 64) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.sin(block(x))
        return x


def int8(module: torch.nn.Module) -> torch.nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig())
    return module


def nf4(module: torch.nn.Module) -> torch.nn.Module:
    import bitsandbytes

    for name, layer in list(module.blocks.named_children()):  # type: ignore[union-attr]
        made = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compress_statistics=name == "1")
        made.load_state_dict(layer.state_dict())
        module.blocks[int(name)] = made.to("cpu")  # type: ignore[index, operator]
    return module


def gguf(module: torch.nn.Module) -> torch.nn.Module:
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    from tests.support.gguf_files import Kind, blocks

    for name, layer in list(module.blocks.named_children()):  # type: ignore[union-attr]
        made = GGUFLinear(64, 64, bias=True, compute_dtype=torch.float32)
        packed = torch.from_numpy(blocks(layer.weight.detach().numpy(), Kind.Q8_0))  # type: ignore[operator, union-attr]
        made.weight = GGUFParameter(packed, quant_type=Kind.Q8_0)
        made.bias = layer.bias
        module.blocks[int(name)] = made  # type: ignore[index, operator]
    return module


@pytest.mark.parametrize("locked", [0, 4])
@pytest.mark.parametrize("quantize", [int8, nf4, gguf], ids=lambda item: item.__name__)
def test_quantized_weights_move_whole(quantize: Any, locked: int) -> None:
    torch.manual_seed(0)
    module = quantize(Stack()).eval()
    x = torch.randn(2, 64)
    with race_device() as device, torch.no_grad():
        expected = module(x)
        objects = [id(parameter) for parameter in module.parameters()]
        kinds = [type(parameter) for parameter in module.parameters()]
        attach(module, "transformer", "cpu", streamed=3, locked=locked)
        for _ in range(3):
            assert torch.equal(module(x), expected)
        assert device.kernels > 0
        saved = module.state_dict()
        detach(module)
    assert [id(parameter) for parameter in module.parameters()] == objects
    assert [type(parameter) for parameter in module.parameters()] == kinds
    assert saved.keys() == module.state_dict().keys()
    with race_device(), torch.no_grad():
        assert torch.equal(module(x), expected)
