"""Quantized components simulated under every placement that their library allows, held against the planner's price."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from make_pipeline import build

from tests.support.gguf_files import Kind, kind_for, write_gguf
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.live import spec_from_pipeline
from vramplan.planner.footprint import Footprint
from vramplan.simulator.alternatives import Alternatives, converted_copy
from vramplan.simulator.model import SimulatedModel, simulated_footprint
from vramplan.strategies import PLACEMENTS
from vramplan.strategies.base import FileName
from vramplan.strategies.bitsandbytes import Bitsandbytes
from vramplan.strategies.gguf import Gguf
from vramplan.strategies.layerwise_casting import LayerwiseCasting
from vramplan.strategies.settings import format_setting, grouped, parse_placement
from vramplan.strategies.torchao import Torchao
from vramplan.workload import Workload

CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=1 << 33, free_bytes=1 << 33)
WORK = Workload(height=64, width=64)
PART = "transformer"
SLACK = 1 << 18  # the price of groups: the two largest, which need not be those that are there at the peak
STREAMED = ("weight_streaming", "weight_streaming:keep=1", "weight_streaming:streamed=3")


@dataclass(frozen=True)
class Priced:
    """A small FLUX pipeline with a weights setting for its transformer, and what the planner knows of it."""

    weights: dict[str, Any]
    spec: Any
    plain: Footprint
    footprint: Footprint
    tensors: int


@cache
def model() -> SimulatedModel:
    """Made once: to be read only."""
    return SimulatedModel(spec_from_pipeline(build("flux-small").to(torch.bfloat16)))


def priced(setting: Any) -> Priced:
    plain, alternatives = simulated_footprint(model(), WORK, CARD), Alternatives(model())
    weights = {PART: setting}
    parts = model().parts.modules
    modules = [converted_copy(parts[PART], setting), *(part for name, part in parts.items() if name != PART)]
    return Priced(
        weights=weights,
        spec=alternatives.spec(weights),
        plain=plain,
        footprint=alternatives.footprint(weights, plain, plain.plain),
        tensors=sum(len([*module.parameters(), *module.buffers()]) for module in modules),
    )


def all_placements() -> Iterator[Any]:
    part = model().spec.component(PART)
    for cls in PLACEMENTS:
        found = [parse_placement(text) for text in STREAMED] if cls.name == "weight_streaming" else cls.variants(part)
        yield from (setting.complete(part) for setting in found)


def allowed(case: Priced) -> list[Any]:
    part = case.spec.component(PART)
    return [setting for setting in all_placements() if setting.refusal(part, case.spec, CARD) is None]


def check_every_placement(setting: Any) -> list[str]:
    """Simulate the setting under each placement; the names of those placements.

    The price is between the weights without unpacking any and with unpacking the largest layer; tensors are rounded up.
    """
    case = priced(setting)
    use = next(use for use in case.spec.uses if use.component == PART)
    unpacking, running = (made.activation(use, ()).size_bytes for made in (case.footprint, case.plain))
    for placement in allowed(case):
        placed, others = {item.name: placement for item in case.spec.components}, 0
        if not placement.whole_pipeline:
            placed = {name: parse_placement("resident") for name in placed} | {PART: placement}
            others = sum(item.weight_bytes for item in case.spec.components if item.name != PART)
        found = model().run(WORK, grouped(placed, case.weights), [], accelerator=CARD)
        simulated = next(phase for phase in found.phases if phase.name == "denoise").peak_allocated_bytes
        weights = placement.hold(case.spec.component(PART), case.spec).running_bytes + others
        assert weights + running - SLACK <= simulated, format_setting(placement)
        assert simulated <= weights + unpacking + 512 * case.tensors, format_setting(placement)
    return sorted({placement.name for placement in allowed(case)})


EVERYWHERE = ["group_offload", "model_cpu_offload", "resident", "sequential_cpu_offload", "weight_streaming"]


@pytest.mark.parametrize("setting", [Torchao(), Torchao(type="float8"), LayerwiseCasting()], ids=format_setting)
def test_what_moves_like_any_tensor_is_simulated_everywhere(setting: Any) -> None:
    assert check_every_placement(setting) == EVERYWHERE


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_gguf_blocks_are_simulated_wherever_they_keep_their_type(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    tensors = build("flux-small").transformer.state_dict()
    file = write_gguf(tmp_path / "flux.gguf", tensors, kind_for(Kind[kind]))
    found = check_every_placement(Gguf(file=FileName(str(file))))
    assert found == [name for name in EVERYWHERE if name != "sequential_cpu_offload"]


@pytest.mark.parametrize(
    ("type_", "places"), [("nf4", ["model_cpu_offload", "resident", "weight_streaming"]), ("int8", ["resident"])]
)
def test_bitsandbytes_is_simulated_where_its_scales_come_along(type_: Any, places: list[str]) -> None:
    assert check_every_placement(Bitsandbytes(type=type_)) == places
