"""What packed layers take while they run: stand-ins against torchao itself, and the price against the simulation."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from make_pipeline import build
from torch.profiler import ProfilerActivity, profile

from tests.support.simulated import small_model
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.geometry import tensors_of
from vramplan.pipeline.live import spec_from_pipeline
from vramplan.pipeline.packed_linear import (
    BitsandbytesInt8,
    BitsandbytesNf4,
    GgufLinear,
    PackedLinear,
    TorchaoFloat8,
    TorchaoInt8,
)
from vramplan.simulator.alternatives import Alternatives
from vramplan.simulator.model import SimulatedModel, simulated_footprint
from vramplan.simulator.unpacking_cost import _packed_cost, unpacking_cost
from vramplan.strategies.base import FileName
from vramplan.strategies.bitsandbytes import Bitsandbytes
from vramplan.strategies.gguf import Gguf
from vramplan.strategies.layerwise_casting import LayerwiseCasting
from vramplan.strategies.settings import format_setting, grouped
from vramplan.strategies.torchao import Torchao
from vramplan.workload import Workload

CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=1 << 33, free_bytes=1 << 33)
WORK = Workload(height=64, width=64)
ROWS, COLUMNS, OUT = 96, 512, 1024


def linear(**options: Any) -> torch.nn.Linear:
    return torch.nn.Linear(COLUMNS, OUT, dtype=torch.bfloat16, **options)


def most_allocated(layer: torch.nn.Module) -> int:
    """The most bytes that a forward on the CPU has allocated at once, from torch's own profiler."""
    given = torch.ones((ROWS, COLUMNS), dtype=torch.bfloat16)
    with torch.no_grad():
        layer(given)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            layer(given)
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


@pytest.mark.parametrize(("type_", "cls"), [("int8", TorchaoInt8), ("float8", TorchaoFloat8)])
def test_a_stand_in_takes_what_torchao_takes(type_: Any, cls: type[PackedLinear]) -> None:
    pytest.importorskip("torchao")
    real = torch.nn.Sequential(linear())
    Torchao(type=type_).apply(SimpleNamespace(components={"part": real}), ["part"], "cpu")
    # the zero point and the scale in other dtypes are a few bytes a row
    assert most_allocated(cls(linear())) == pytest.approx(most_allocated(real[0]), abs=16 * OUT)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0", "Q4_K", "Q6_K", "Q3_K", "IQ4_XS", "BF16"])
def test_a_gguf_stand_in_takes_what_diffusers_takes(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    real = GGUFLinear(COLUMNS, OUT, True, compute_dtype=torch.bfloat16)
    quant_type = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quant_type]
    real.weight = GGUFParameter(torch.ones((OUT, COLUMNS // block * size), dtype=torch.uint8), quant_type=quant_type)
    real.bias = torch.nn.Parameter(real.bias.data.to(torch.bfloat16))
    light = GgufLinear(linear(), kind)
    assert most_allocated(light) == most_allocated(real)
    assert sum(tensor.nbytes for tensor in light.parameters()) == sum(tensor.nbytes for tensor in real.parameters())
    with torch.device("meta"):
        cost = _packed_cost(GgufLinear(linear(), kind), 1, torch.bfloat16)
    # unpacking is over before the product is made. The CPU casts whole operands first where a product is of half
    # precision and 8-bit integers, an accelerator does not; these are the types that have such a product last
    cast = 2 * COLUMNS * OUT if kind in ("Q6_K", "Q3_K") else COLUMNS * OUT if kind == "Q4_0" else 0
    assert cost.extra_bytes == pytest.approx(most_allocated(real) - cast - 2 * OUT, rel=0.001)


def extra(cls: type[PackedLinear], rows: int) -> int:
    with torch.device("meta"):
        return _packed_cost(cls(linear()), rows, torch.bfloat16).extra_bytes


def test_the_unpacked_weight_is_charged() -> None:
    weight = COLUMNS * OUT
    assert extra(BitsandbytesNf4, 1) == 2 * weight
    assert extra(TorchaoInt8, 1) == pytest.approx(2 * weight, rel=0.01)
    assert extra(TorchaoFloat8, 1) == pytest.approx(10 * weight, rel=0.01)  # twice in float32, once in bfloat16
    rows = 4096
    assert extra(BitsandbytesNf4, rows) == 2 * weight
    # the product before it is scaled, which is more than the weight
    assert extra(TorchaoInt8, rows) == pytest.approx(2 * rows * OUT, rel=0.01)
    assert extra(BitsandbytesInt8, rows) > 4 * rows * OUT  # the product in 32 bits


def test_layers_that_are_not_packed_take_nothing_more() -> None:
    model = small_model("flux-small")
    transformer = copy.deepcopy(model.parts.modules["transformer"])
    found = unpacking_cost("transformer", transformer, torch.float32, model.run(WORK, [], [], accelerator=CARD))
    assert (found.extra_bytes, found.traffic_bytes, found.launches) == (0, 0, 0)


@cache
def small_in_half() -> SimulatedModel:
    """Made once: to be read only."""
    return SimulatedModel(spec_from_pipeline(build("flux-small").to(torch.bfloat16)))


SETTINGS = [
    Torchao(),
    Torchao(type="float8"),
    Bitsandbytes(),
    Bitsandbytes(type="int8"),
    LayerwiseCasting(),
]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K"])
def test_the_price_of_a_gguf_file_is_no_less_than_what_is_simulated(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.support.gguf_files import Kind, kind_for, write_gguf

    tensors = build("flux-small").transformer.state_dict()
    file = write_gguf(tmp_path / "flux.gguf", tensors, kind_for(Kind[kind]))
    test_the_price_is_no_less_than_what_is_simulated(Gguf(file=FileName(str(file))))


@pytest.mark.parametrize("setting", SETTINGS, ids=format_setting)
def test_the_price_is_no_less_than_what_is_simulated(setting: Any) -> None:
    source, weights = small_in_half(), {"transformer": setting}
    spec = source.spec
    plain = simulated_footprint(source, WORK, CARD)
    forms = Alternatives(source)
    light, priced = forms.spec(weights), forms.footprint(weights, plain, plain.plain)
    found = source.run(WORK, grouped({}, weights), [], accelerator=CARD)
    use = next(use for use in spec.uses if use.component == "transformer")
    denoise = next(phase for phase in found.phases if phase.name == "denoise")
    rounding = 512 * sum(5 * len(tensors_of(module)) for module in source.parts.modules.values())
    assert light.weight_bytes < spec.weight_bytes
    assert denoise.peak_allocated_bytes <= light.weight_bytes + priced.activation(use, ()).size_bytes + rounding
    assert priced.work(use, ()).traffic_bytes > plain.work(use, ()).traffic_bytes
    assert priced.work(use, ()).flops == plain.work(use, ()).flops
