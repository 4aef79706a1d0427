"""What a candidate asks of the machine: the highest moment, RAM, and time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.support.specs import GIB, MIB, WORK, card, component, geometry, pipeline, text_to_image
from vramplan.pipeline.types import PipelineSpec, Use
from vramplan.planner.clock import DEFAULT_RATES
from vramplan.planner.demand import Demand, Pricer
from vramplan.planner.footprint import AssumedFootprint, Estimate
from vramplan.planner.loading import LoadDemand
from vramplan.strategies.encode_first import EncodeFirst
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.model_cpu_offload import ModelCpuOffload
from vramplan.strategies.resident import Resident
from vramplan.strategies.sequential_cpu_offload import SequentialCpuOffload
from vramplan.strategies.vae_slicing import VaeSlicing
from vramplan.strategies.vae_tiling import VaeTiling
from vramplan.workload import Workload


def demand_of(spec: PipelineSpec, setting: Any, decode: Any = (), work: Workload = WORK, **options: Any) -> Demand:
    placement = {part.name: setting for part in spec.components}
    footprint = options.pop("footprint", AssumedFootprint(spec=spec, workload=work))
    accelerator = options.pop("accelerator", card())
    assert not options
    return Pricer(spec, work, footprint, accelerator)(placement, tuple(decode))


def priced(spec: PipelineSpec, placement: Any) -> Demand:
    footprint = AssumedFootprint(spec=spec, workload=WORK)
    return Pricer(spec, WORK, footprint, card())(placement, ())


def test_the_peak_is_the_highest_moment_and_not_the_sum() -> None:
    spec = text_to_image(encoder=10 * GIB, denoiser=4 * GIB)
    demand = demand_of(spec, ModelCpuOffload())
    assert [phase.name for phase in demand.phases] == ["encode", "denoise", "decode"]
    assert demand.vram_allocated_bytes == max(phase.allocated_bytes for phase in demand.phases)
    encode = demand.phases[0]
    assert (encode.weights_bytes, encode.workspace_bytes) == (
        10 * GIB,
        AssumedFootprint(spec=spec, workload=WORK).workspace_bytes,
    )
    assert encode.allocated_bytes == encode.weights_bytes + encode.activation_bytes + encode.workspace_bytes


def test_what_is_reserved_is_the_highest_of_all_moments() -> None:
    """Of two moments of a phase the one with less allocated may have more reserved."""

    class Footprint(AssumedFootprint):
        def activation(self, use: Use, decode: Any) -> Estimate:
            size = 59 * GIB // 10 if use.component == "image_encoder" else 0
            return Estimate(size_bytes=size, reserved_bytes=size * 7 // 5, basis="assumed")

    parts = [component("text_encoder", 10 * GIB, role="text_encoder")]
    parts += [component("image_encoder", 4 * GIB, role="image_encoder"), component("transformer", MIB)]
    spec = pipeline(*parts)
    demand = demand_of(spec, ModelCpuOffload(), footprint=Footprint(spec=spec, workload=WORK))
    assert demand.vram_allocated_bytes == 10 * GIB + MIB + demand.phases[0].workspace_bytes
    assert demand.phases[0].component == "image_encoder"
    assert demand.vram_reserved_bytes > 12 * GIB
    assert demand.vram_reserved_bytes == max(phase.reserved_bytes for phase in demand.phases)


def test_residents_are_charged_together_and_take_no_ram() -> None:
    spec = text_to_image()
    demand = demand_of(spec, Resident())
    assert demand.ram_bytes == 0
    assert all(phase.weights_bytes == spec.weight_bytes for phase in demand.phases)


def test_offloaded_weights_are_charged_to_ram() -> None:
    spec = text_to_image()
    for setting in (ModelCpuOffload(), SequentialCpuOffload(), GroupOffload(type="leaf")):
        assert demand_of(spec, setting).ram_bytes == spec.weight_bytes


def test_pinned_copies_and_the_largest_transient_are_charged() -> None:
    spec = pipeline(component("transformer", 8 * GIB, blocks=8), component("transformer_2", 4 * GIB, blocks=8))
    demand = demand_of(spec, GroupOffload(stream=True))
    assert demand.pinned_bytes == sum(part.geometry.pinned_bytes for part in spec.components)
    first, second = (part.geometry.pinned_bytes for part in spec.components)
    # loaded one after another, the smaller one beside the first one's pinned copies
    assert demand.ram_bytes == max(first + 8 * GIB, first + second + 4 * GIB)
    live = pipeline(*(replace(part, device="cpu") for part in spec.components))
    assert demand_of(live, GroupOffload(stream=True)).ram_bytes == demand.pinned_bytes + 8 * GIB


def test_what_is_converted_while_loading_is_charged_once() -> None:
    parts = [replace(part, converted_at_load=True) for part in text_to_image().components]
    spec = pipeline(*parts)
    assert demand_of(spec, ModelCpuOffload()).ram_bytes == spec.weight_bytes


def test_what_is_converted_on_its_way_to_the_device_is_there_in_part() -> None:
    parts = [replace(part, converted_at_load=True) for part in text_to_image(denoiser=8 * GIB).components]
    demand = demand_of(pipeline(*parts), Resident())
    assert demand.load == LoadDemand(
        component="transformer", ram_bytes=2 * GIB, order=("transformer", "text_encoder", "vae")
    )
    assert demand.ram_bytes == 2 * GIB
    assert demand_of(text_to_image(), Resident()).ram_bytes == 0


def test_what_something_is_done_to_passes_through_ram() -> None:
    parts = [
        replace(part, cast_from_bytes=2 * part.weight_bytes) for part in text_to_image(denoiser=8 * GIB).components
    ]
    assert demand_of(pipeline(*parts), Resident()).ram_bytes == 8 * GIB
    converted = [replace(part, converted_at_load=True) for part in parts]
    assert demand_of(pipeline(*converted), Resident()).ram_bytes == 16 * GIB


def test_encoding_first_never_holds_the_encoder_beside_the_rest() -> None:
    spec = text_to_image(encoder=10 * GIB, denoiser=8 * GIB)
    first = {"text_encoder": EncodeFirst(), "transformer": Resident(), "vae": Resident()}
    demand = priced(spec, first)
    encode, denoise, decode = demand.phases
    assert (encode.weights_bytes, encode.on_device) == (10 * GIB, ("text_encoder",))
    assert denoise.weights_bytes == decode.weights_bytes == spec.weight_bytes - 10 * GIB
    assert denoise.on_device == decode.on_device == ("transformer", "vae")
    assert demand.ram_bytes == 0
    resident = priced(spec, {**first, "text_encoder": Resident()})
    assert demand.seconds_per_call - resident.seconds_per_call == pytest.approx(
        10 * GIB / DEFAULT_RATES.disk_bytes_per_s
    )


def test_ram_is_that_of_the_larger_of_both_times() -> None:
    spec = text_to_image(encoder=10 * GIB, denoiser=8 * GIB)
    placed = {"text_encoder": EncodeFirst(leaf=True), "transformer": GroupOffload(type="leaf"), "vae": Resident()}
    assert priced(spec, placed).ram_bytes == 10 * GIB
    both = {**placed, "text_encoder": GroupOffload(type="leaf")}
    assert priced(spec, both).ram_bytes == 18 * GIB


def test_an_excluded_component_is_resident_and_charged() -> None:
    plain, spec = text_to_image(), text_to_image(excluded=frozenset({"vae"}))
    vae = spec.component("vae").weight_bytes
    for setting in (ModelCpuOffload(), SequentialCpuOffload()):
        before, after = (demand_of(item, setting).phases[1] for item in (plain, spec))
        assert after.weights_bytes - before.weights_bytes == vae
        assert "vae" in after.on_device


def test_a_component_outside_the_sequence_is_charged_in_every_phase() -> None:
    spec = text_to_image(sequence=("text_encoder", "transformer"))
    vae = spec.component("vae").weight_bytes
    plain = demand_of(text_to_image(), ModelCpuOffload())
    demand = demand_of(spec, ModelCpuOffload())
    assert [a.weights_bytes - b.weights_bytes for a, b in zip(demand.phases, plain.phases, strict=True)][:2] == [
        vae,
        vae,
    ]


def test_an_optional_encoder_is_charged_where_it_runs_and_where_it_is_left_out() -> None:
    parts = text_to_image().components
    extra = component("image_encoder", GIB, role="image_encoder")
    spec = pipeline(*parts, extra, sequence=("text_encoder", "image_encoder", "transformer", "vae"))
    denoise = next(phase for phase in demand_of(spec, ModelCpuOffload()).phases if phase.name == "denoise")
    assert {"text_encoder", "transformer"} <= set(denoise.on_device)


def test_offloading_costs_time_in_this_order() -> None:
    """Without a stream a group is copied back to pageable memory after use; sequential offload drops it."""
    spec = text_to_image()
    group = GroupOffload(type="leaf")
    times = [
        demand_of(spec, setting).seconds_per_call
        for setting in (Resident(), ModelCpuOffload(), SequentialCpuOffload(), group)
    ]
    assert times == sorted(times)
    assert len(set(times)) == len(times)


def test_more_steps_take_longer_and_not_more_memory() -> None:
    spec = text_to_image()
    one, many = (demand_of(spec, Resident(), work=replace(WORK, num_inference_steps=n)) for n in (1, 50))
    assert many.seconds_per_call > one.seconds_per_call
    assert many.vram_reserved_bytes == one.vram_reserved_bytes
    assert many.seconds_per_step == one.seconds_per_step


def test_a_faster_link_makes_offloading_cheaper_and_residents_not() -> None:
    spec = text_to_image()
    fast = card(rates=replace(card().rates, link_bytes_per_s=60e9))
    assert demand_of(spec, Resident(), accelerator=fast) == demand_of(spec, Resident())
    assert (
        demand_of(spec, ModelCpuOffload(), accelerator=fast).seconds_per_call
        < demand_of(spec, ModelCpuOffload()).seconds_per_call
    )


def test_tiles_and_slices_take_memory_off_the_decode_only() -> None:
    spec = text_to_image()
    work = Workload(height=1024, width=1024, num_images_per_prompt=4)
    plain, less = (demand_of(spec, Resident(), decode, work) for decode in ((), (VaeSlicing(), VaeTiling())))
    assert plain.phases[:2] == less.phases[:2]
    assert less.phases[2].activation_bytes < plain.phases[2].activation_bytes / 4


def test_the_basis_is_that_of_the_weakest_number() -> None:
    assert demand_of(text_to_image(), Resident()).basis == "assumed"


def test_a_component_without_blocks_still_has_a_price() -> None:
    spec = pipeline(component("transformer", GIB, geometry=geometry(GIB)))
    assert demand_of(spec, GroupOffload(type="leaf")).vram_allocated_bytes < GIB
