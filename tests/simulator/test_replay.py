"""A replay is the simulation, to the byte and in each word, under every placement and in any capacity."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.calls import workload_of
from tests.support.simulated import small_model
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.describe import describe
from vramplan.simulator.model import SimulatedModel
from vramplan.simulator.recorded_call import RecordedCall
from vramplan.simulator.trace import CallTrace, Overlay, other_events
from vramplan.simulator.types import Simulation
from vramplan.strategies import PLACEMENTS, Placement
from vramplan.strategies.encode_first import EncodeFirst
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.resident import Resident
from vramplan.strategies.settings import grouped, parse_decode
from vramplan.strategies.weight_streaming import WeightStreaming, streaming_sizes
from vramplan.streaming.division import worth_streaming
from vramplan.units import GIB
from vramplan.workload import make_workload

SMALL = ("sd15-small", "sdxl-small", "flux-small", "cogvideox-small")
CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=8 * GIB, free_bytes=8 * GIB)


def facts(found: Simulation) -> Any:
    """All that a plan takes from a simulation."""
    return (
        *(found.peak_allocated_bytes, found.peak_reserved_bytes, found.phases, found.fits, found.capacity_bytes),
        *(found.stopped, found.stopped_in, found.short_bytes, found.over_bytes),
    )


def assert_equal(
    model: SimulatedModel, work: Any, placement: Mapping[str, Placement], decode: tuple[str, ...] = ()
) -> int:
    """The replay and the simulation are equal without a capacity and in two; return how many of them stopped."""
    decodes = [(parse_decode(text), [vae.name for vae in model.spec.vaes]) for text in decode]
    stopped, whole = 0, None
    for share in (None, 0.9, 0.6):
        capacity = None if share is None or whole is None else int(whole * share)
        run = model.run(work, grouped(placement), decodes, accelerator=CARD, capacity_bytes=capacity)
        again = model.replayed(work, placement, {}, decodes, accelerator=CARD, capacity_bytes=capacity)
        assert again is not None
        assert facts(again) == facts(run)
        whole = whole or run.peak_reserved_bytes
        stopped += run.stopped is not None
    return stopped


@pytest.mark.diagonal("kind", "cls")
@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("cls", [cls for cls in PLACEMENTS if cls is not EncodeFirst])
def test_every_placement(kind: str, cls: type[Any]) -> None:
    spec = small_model(kind).spec
    for setting in cls.variants(spec.components[0]):
        placement: dict[str, Placement] = {}
        for part in spec.components:
            mine = setting.complete(part)
            placement[part.name] = Resident() if mine.refusal(part, spec, CARD) else mine
        assert_equal(small_model(kind), workload_of(kind), placement)


@pytest.mark.parametrize("kind", SMALL)
@settings(deadline=None, max_examples=3, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_division_of_streamed_weights_beside_other_placements(kind: str, data: st.DataObject) -> None:
    model = small_model(kind)
    placement: dict[str, Placement] = {}
    for part in model.spec.components:
        sizes = streaming_sizes(part)
        streamed = data.draw(st.sampled_from([0, *range(3, len(worth_streaming(sizes)) + 1)]), part.name)
        keep = data.draw(st.integers(0, len(sizes) - streamed), f"keep of {part.name}")
        leaf = GroupOffload(type="leaf")
        other = Resident() if leaf.refusal(part, model.spec, CARD) else leaf
        placement[part.name] = data.draw(
            st.sampled_from([WeightStreaming(streamed=streamed, keep=keep), Resident(), other]), part.name
        )
    assert_equal(model, workload_of(kind), placement, data.draw(st.sampled_from([(), ("vae_tiling",)])))


def test_some_of_these_run_out_of_memory_in_both() -> None:
    placement = {part.name: WeightStreaming() for part in small_model("flux-small").spec.components}
    assert assert_equal(small_model("flux-small"), workload_of("flux-small"), placement)


def test_a_vae_that_its_pipeline_casts() -> None:
    described = describe("stable-diffusion-xl")
    model, work = SimulatedModel(described.spec), make_workload(described.defaults, {"height": 512, "width": 512})
    for vae in (Resident(), WeightStreaming()):
        placement: dict[str, Placement] = {part.name: WeightStreaming() for part in described.spec.components}
        assert_equal(model, work, {**placement, "vae": vae})


def test_weights_that_a_pipeline_reads_itself_are_simulated_where_they_are_not_on_the_device() -> None:
    described = describe("flux.2-klein-4b")
    model, work = SimulatedModel(described.spec), make_workload(described.defaults, {"height": 256, "width": 256})
    placement: dict[str, Placement] = {part.name: Resident() for part in described.spec.components}
    assert_equal(model, work, placement)
    for vae in (WeightStreaming(), GroupOffload(type="leaf")):
        streamed = {**placement, "vae": vae}
        assert model.replayed(work, streamed, {}, [], accelerator=CARD, capacity_bytes=None) is None


def test_components_that_are_dropped_in_the_middle_of_a_call_are_simulated() -> None:
    model = small_model("flux-small")
    placement: dict[str, Placement] = {
        part.name: EncodeFirst() if part.role == "text_encoder" else Resident() for part in model.spec.components
    }
    work = workload_of("flux-small")
    assert model.replayed(work, placement, {}, [], accelerator=CARD, capacity_bytes=None) is None


def test_traces_are_read_as_they_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("sd15-small")
    call = RecordedCall(model, workload_of("sd15-small"), [], [], model.kernels(CARD))
    trace, overlay = call.trace(), call.overlay(GroupOffload(type="leaf"), ["unet"])
    assert CallTrace.from_bytes(trace.to_bytes()) == trace
    assert Overlay.from_bytes(overlay.to_bytes()) == overlay
    for content in (b"", b"12345678", trace.to_bytes()[:-3], overlay.to_bytes()):
        with pytest.raises(ValueError, match=r"damaged|Expecting|length"):
            CallTrace.from_bytes(content)
    others = list(other_events(trace, ["unet"]))
    assert 0 < len(others) <= len(list(other_events(trace, [])))


def test_another_call_under_a_placement_is_not_laid_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimulatedModel(small_model("sd15-small").spec)
    call = RecordedCall(model, workload_of("sd15-small"), [], [], model.kernels(CARD))
    call.trace()
    other = replace(workload_of("sd15-small"), height=128)
    monkeypatch.setattr(call, "workload", other)
    monkeypatch.setattr(model, "cached", lambda key, make, codec: make())
    assert call.overlay(GroupOffload(type="leaf"), ["unet"]).names == ()


def test_a_replay_needs_no_torch() -> None:
    code = (
        "import sys, vramplan.simulator.replay; sys.exit(any(name in sys.modules for name in ('torch', 'diffusers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
