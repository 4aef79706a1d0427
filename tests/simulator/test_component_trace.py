"""A pipeline that cannot be driven is planned from its components, traced one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import pytest

import vramplan
from tests.support.calls import workload_of
from tests.support.simulated import small_model
from vramplan.errors import VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.describe import describe
from vramplan.pipeline.types import Use
from vramplan.planner.decision import Decision
from vramplan.planner.demand import Pricer
from vramplan.simulator import component_trace
from vramplan.simulator.component_trace import trace_components
from vramplan.simulator.cost_model import apply_simulation
from vramplan.simulator.footprint import SimulatedFootprint
from vramplan.simulator.kernels import Kernels
from vramplan.simulator.model import SimulatedModel
from vramplan.simulator.run import call_inputs
from vramplan.simulator.types import SimulationError
from vramplan.strategies.resident import Resident
from vramplan.units import GIB

SMALL = ("sd15-small", "sdxl-small", "flux-small", "cogvideox-small")
CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))


class AsksForMemory(diffusers.FluxPipeline):
    """Looks at the bytes of its latents, which hollow ones do not have."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs)
        bytes(result.images.untyped_storage())
        return result


@pytest.fixture(scope="module")
def undriveable(small_pipeline: Callable[..., Any]) -> Any:
    """A pipeline whose call cannot be simulated. Made once: what is applied to it is undone."""
    return AsksForMemory(**small_pipeline("flux-small").components)


@pytest.mark.parametrize("kind", SMALL)
def test_alone_a_component_takes_what_it_takes_in_the_call(kind: str) -> None:
    source, work = small_model(kind), workload_of(kind)
    spec = source.spec
    plain = source.run(work, [], [], accelerator=None)
    alone = trace_components(source.parts, spec, work, Kernels())
    assert [replace(item, stride=()) for item in alone.decoded] == [replace(item, stride=()) for item in plain.decoded]
    assert {use.component for use in alone.uses} == {use.component for use in spec.uses}
    for use in alone.uses:
        whole = plain.use(use.phase, use.component)
        assert whole is not None
        if use.component == "vae":
            assert use.need_bytes == pytest.approx(whole.need_bytes, rel=0.1)
        else:  # other lengths of text: the same within a few times, where rules of thumb are off by hundreds
            assert whole.need_bytes / 2 < use.need_bytes < whole.need_bytes * 8


def test_the_plan_says_what_stopped_the_call_and_lowers_its_basis(undriveable: Any) -> None:
    pipe = undriveable
    with pytest.raises(SimulationError, match="stopped in"):
        vramplan.simulate(pipe, workload=workload_of("flux-small"))
    plan = vramplan.plan(pipe, device=MACHINE, vram="60MiB", height=64, width=64)
    assert plan.projected.basis == "derived"
    (note,) = [note for note in plan.notes if "one by one" in note]
    assert "the call stopped in" in note
    vramplan.apply_plan(pipe, plan, device="cpu").undo()


def test_tiling_is_priced_from_the_decode_alone(undriveable: Any) -> None:
    pipe = undriveable
    plain, tiled = (
        vramplan.plan(pipe, device=MACHINE, settings={"decode": decode}, height=64, width=64)
        for decode in (["plain"], ["vae_tiling:tile=32"])
    )
    peaks = [
        next(phase for phase in plan.projected.phases if phase.name == "decode").activation_bytes
        for plan in (plain, tiled)
    ]
    assert peaks[1] < peaks[0]


def test_what_cannot_be_traced_either_is_named_and_counted_by_rules_of_thumb(
    undriveable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = undriveable
    whole = vramplan.plan(pipe, device=MACHINE, height=64, width=64)
    monkeypatch.setenv("VRAMPLAN_CACHE", "0")
    monkeypatch.setattr(component_trace, "_denoiser_inputs", lambda *_: iter([{"hidden_states": (1, 1)}]))
    plan = vramplan.plan(pipe, device=MACHINE, height=64, width=64)
    assert (whole.projected.basis, plan.projected.basis) == ("derived", "assumed")
    assert "not all could be traced: rules of thumb stand in for transformer" in plan.notes
    assert [phase.name for phase in plan.projected.phases] == ["encode", "denoise", "decode"]
    denoise = plan.projected.phases[1]
    assert denoise.component == "transformer"
    assert denoise.activation_bytes > 0


def test_a_pipeline_without_its_denoiser_does_not_fit_everything(small_pipeline: Callable[..., Any]) -> None:
    pipe = diffusers.FluxPipeline(**small_pipeline("flux-small").components | {"transformer": None})
    with pytest.raises(VramplanError, match="FluxPipeline: no component denoises, and its whole call"):
        vramplan.plan(pipe, device=MACHINE, height=64, width=64)


class Skips(diffusers.FluxPipeline):
    """Never comes to its denoiser."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.encode_prompt("a fox", None, device="cuda:0")


def test_a_phase_that_the_simulated_call_left_out_is_counted_and_told(small_pipeline: Callable[..., Any]) -> None:
    plan = vramplan.plan(Skips(**small_pipeline("flux-small").components), device=MACHINE, height=64, width=64)
    assert plan.projected.basis == "assumed"
    assert "not all ran in the simulated call: rules of thumb stand in for transformer, vae" in plan.notes
    assert {phase.name for phase in plan.projected.phases} == {"encode", "denoise", "decode"}


def test_a_simulation_that_left_a_phase_out_takes_nothing_from_its_price() -> None:
    source, work = small_model("flux-small"), workload_of("flux-small")
    spec = source.spec
    found = source.run(work, [], [], accelerator=CARD)
    footprint = SimulatedFootprint(spec=spec, workload=work, plain=found, decode=lambda _: found)
    placement = {component.name: Resident() for component in spec.components}
    demand = Pricer(spec, work, footprint, CARD)(placement, ())
    priced = Decision(placement=placement, decode=(), demand=demand, verdict="fits", reason="", deficit_bytes=0)
    whole, (_, denoise, _) = apply_simulation(priced, found).demand, demand.phases
    assert whole.vram_reserved_bytes == found.peak_reserved_bytes
    without = replace(found, phases=tuple(phase for phase in found.phases if phase.name != "denoise"))
    low = apply_simulation(priced, replace(without, peak_reserved_bytes=1, peak_allocated_bytes=1)).demand
    assert low.phases == (whole.phases[0], denoise, whole.phases[2])
    assert (low.vram_reserved_bytes, low.vram_allocated_bytes) == (denoise.reserved_bytes, denoise.allocated_bytes)


@pytest.mark.parametrize(("short", "lack"), [(0, "as much is free, but in pieces too small"), (2048, "at least 2 KiB")])
def test_what_ran_out_says_by_how_much_or_that_it_lies_in_pieces(short: int, lack: str) -> None:
    found = small_model("flux-small").run(workload_of("flux-small"), [], [], accelerator=CARD)
    stopped = replace(found, stopped="out of memory", short_bytes=short, over_bytes=4096)
    priced = Decision(placement={}, decode=(), demand=None, verdict="fits", reason="", deficit_bytes=0)  # type: ignore[arg-type]
    told = apply_simulation(priced, stopped)
    assert told.verdict == "rejected"
    assert lack in told.reason
    assert told.deficit_bytes == (short or 4096)


def with_controlnet(base: Any) -> Any:
    """Its VAE is said to encode a picture, and never does: the control picture goes to the ControlNet as it is."""
    net = diffusers.ControlNetModel.from_unet(base.unet, conditioning_channels=3)
    parts = dict(base.components) | {"controlnet": net}
    return diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)


def test_a_use_that_a_completed_call_did_not_make_costs_nothing(small_pipeline: Callable[..., Any]) -> None:
    base = small_pipeline("sd15-small")
    plain, controlled = (
        vramplan.plan(pipe, device="rtx-3090", ram="32GiB", height=64, width=64)
        for pipe in (base, with_controlnet(base))
    )
    assert controlled.projected.basis == "simulated"
    assert not [note for note in controlled.notes if "rules of thumb" in note]
    assert controlled.machine.budget.vram_bytes == plain.machine.budget.vram_bytes


def test_only_uses_of_a_completed_call_are_ruled_out(small_pipeline: Callable[..., Any]) -> None:
    pipe, work = with_controlnet(small_pipeline("sd15-small")), workload_of("sd15-small")
    source = SimulatedModel(spec := describe(pipe).spec)
    found = source.run(work, [], [], accelerator=CARD)
    whole = SimulatedFootprint(spec=spec, workload=work, plain=found, decode=lambda _: found)
    stopped = replace(whole, plain=replace(found, uses=tuple(use for use in found.uses if use.phase == "encode")))
    encode = Use(phase="encode", component="vae")
    assert encode in spec.uses
    assert not whole.makes(encode)
    assert stopped.makes(encode)
    assert replace(whole, basis="derived").makes(encode)
    assert all(stopped.makes(use) for use in spec.uses)


@pytest.mark.parametrize(
    ("name", "quotes"), [("HunyuanVideo15Pipeline", True), ("HunyuanImagePipeline", True), ("FluxPipeline", False)]
)
def test_the_prompt_quotes_a_text_for_pipelines_that_encode_one_apart(name: str, quotes: bool) -> None:
    pipe = object.__new__(getattr(diffusers, name))
    assert ('"' in call_inputs(pipe, workload_of("flux-small"))["prompt"]) is quotes
