"""Partial residency: priced as it is, the same pictures, and taken off again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make_pipeline import build

from tests.support.calls import call_kwargs, output_tensor
from tests.support.specs import GIB, card, component, text_to_image
from vramplan.pipeline.describe import describe
from vramplan.pipeline.geometry import module_bytes, units_of
from vramplan.pipeline.modules import modules_of
from vramplan.simulator.model import SimulatedModel
from vramplan.strategies.base import remove_group_hooks
from vramplan.strategies.partial_residency import PartialResidency, apply_partial_residency, spread_evenly
from vramplan.strategies.settings import grouped, parse_placement
from vramplan.workload import make_workload

SMALL = {"sd15-small": "unet", "sdxl-small": "unet", "flux-small": "transformer"}
ENCODERS = {"sd15-small": "text_encoder", "flux-small": "text_encoder_2", "cogvideox-small": "text_encoder"}
SPEC = text_to_image()


def small(kind: str) -> Any:
    pipe = build(kind)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def simulated(pipe: Any, kind: str, name: str, setting: str) -> Any:
    spec = describe(pipe).spec
    work = make_workload({}, {k: v for k, v in call_kwargs(kind).items() if k in ("height", "width", "num_frames")})
    placement = {part.name: parse_placement("resident") for part in spec.components}
    placement[name] = parse_placement(setting)
    return SimulatedModel(spec).run(work, grouped(placement), [], accelerator=card()), spec.component(name)


@pytest.mark.parametrize("kind", SMALL)
def test_what_is_on_the_device_is_what_was_priced(kind: str) -> None:
    pipe = small(kind)
    name = SMALL[kind]
    most = next(iter(PartialResidency.variants(describe(pipe).spec.component(name)))).streamed
    resident, part = simulated(pipe, kind, name, "resident")
    before = next(phase for phase in resident.phases if phase.name == "denoise").weights_bytes
    for streamed in sorted({3, most // 2, most} - {0, 1, 2}):
        result, _ = simulated(pipe, kind, name, f"partial_residency:streamed={streamed}")
        assert result.stopped is None
        hold = PartialResidency(streamed=streamed).hold(part, SPEC)
        denoise = next(phase for phase in result.phases if phase.name == "denoise")
        # small tensors are rounded up to 512 bytes, on the device and off it
        saved = before - denoise.weights_bytes
        assert saved == pytest.approx(part.weight_bytes - hold.running_bytes, rel=0.35, abs=2048)
        assert 0 < result.pinned_peak_bytes <= hold.pinned_bytes * 1.01
        assert use_flops(result) == use_flops(resident)
        low, _ = simulated(pipe, kind, name, f"partial_residency:streamed={streamed},low_cpu_mem_usage=true")
        assert low.peak_reserved_bytes == result.peak_reserved_bytes
        assert low.pinned_peak_bytes < result.pinned_peak_bytes


def use_flops(result: Any) -> dict[tuple[str, str], float]:
    return {(use.phase, use.component): use.flops for use in result.uses}


@pytest.mark.parametrize("name", ["text_encoder_2", "transformer"])
@pytest.mark.parametrize("disk", ["", ",disk=true"])
def test_encoders_and_files_are_simulated_as_they_were_priced(name: str, disk: str) -> None:
    pipe = small("flux-small")
    resident, part = simulated(pipe, "flux-small", name, "resident")
    phase = "denoise" if name == "transformer" else "encode"
    for streamed in (3, len(part.geometry.units)):
        setting = f"partial_residency:streamed={streamed}{disk}"
        result, _ = simulated(pipe, "flux-small", name, setting)
        assert result.stopped is None
        hold = parse_placement(setting).hold(part, SPEC)
        before, after = (weights(found, phase) for found in (resident, result))
        saved = part.weight_bytes - hold.running_bytes
        # small tensors are rounded up to 512 bytes, on the device and off it; another encoder may be what peaks
        assert saved * 0.65 - 2048 <= before - after <= part.weight_bytes - hold.idle_bytes + 4096
        assert use_flops(result) == use_flops(resident)
        assert bool(result.pinned_peak_bytes) is not bool(disk)


def weights(result: Any, phase: str) -> int:
    return next(found.weights_bytes for found in result.phases if found.name == phase)


@pytest.mark.parametrize(("kind", "name"), [*SMALL.items(), *ENCODERS.items()])
def test_pictures_are_the_same_bit_for_bit(kind: str, name: str) -> None:
    pipe = small(kind)

    def picture() -> torch.Tensor:
        return output_tensor(pipe(**call_kwargs(kind) | {"output_type": "pt"}))

    plain = picture()
    modules = modules_of(pipe)
    part = describe(pipe).spec.component(name)
    able = [count for count in range(3, 99) if PartialResidency(streamed=count).refusal(part, SPEC, card()) is None]
    for streamed in {able[0], able[-1]}:
        apply_partial_residency(modules[name], "cpu", streamed)
        hooked = [child for child in modules[name].modules() if hasattr(child, "_diffusers_hook")]
        held = [child for child in hooked if child._diffusers_hook.get_hook("group_offloading") is not None]
        assert len(held) == streamed + 1  # the blocks, and the module itself
        assert torch.equal(picture(), plain)
        remove_group_hooks(pipe, [name])
        assert all(child._diffusers_hook.get_hook("group_offloading") is None for child in hooked)
        assert torch.equal(picture(), plain)


@given(st.lists(st.integers(1, 100), min_size=3, max_size=80), st.data())
def test_streamed_blocks_are_spread_evenly(sizes: list[int], data: Any) -> None:
    worth = [place for place, size in enumerate(sizes) if size >= max(sizes) / 4]
    count = data.draw(st.integers(1, len(worth)))
    places = spread_evenly(sizes, count)
    assert len(set(places)) == count
    assert places == sorted(places)
    assert set(places) <= set(worth)
    ranks = [worth.index(place) for place in places]
    gaps = [after - before for before, after in zip([-1, *ranks], ranks, strict=False)]
    assert max(gaps) - min(gaps) <= 1
    with pytest.raises(ValueError, match="to stream"):
        spread_evenly(sizes, len(worth) + 1)


@given(st.integers(3, 60), st.data())
def test_fewer_streamed_blocks_take_more_memory_and_move_less(blocks: int, data: Any) -> None:
    part = component("transformer", blocks=blocks)
    low = data.draw(st.booleans())
    disk = not low and data.draw(st.booleans())
    kind = PartialResidency(low_cpu_mem_usage=low, disk=disk)
    rungs = [setting for setting in PartialResidency.variants(part) if setting.ladder == kind.ladder]
    holds = [setting.hold(part, SPEC) for setting in rungs]
    assert rungs
    assert all((hold.pinned_bytes == 0) is (low or disk) for hold in holds)
    assert all((hold.disk_bytes > 0) is disk for hold in holds)
    assert [hold.running_bytes for hold in holds] == sorted(hold.running_bytes for hold in holds)
    moved = [hold.moved_in_bytes + hold.disk_bytes for hold in holds]
    assert moved == sorted(moved, reverse=True)
    assert all(hold.idle_bytes < hold.running_bytes <= part.weight_bytes for hold in holds)


@pytest.mark.parametrize(
    ("setting", "part", "words"),
    [
        (PartialResidency(streamed=2), component("transformer", blocks=8), "can stream 3 to 8"),
        (PartialResidency(streamed=9), component("transformer", blocks=8), "can stream 3 to 8"),
        (PartialResidency(streamed=3), component("transformer", blocks=2), "has 2 blocks worth streaming"),
        (PartialResidency(streamed=3), component("vae", role="vae", blocks=8), "a VAE cannot be streamed"),
        (PartialResidency(streamed=1, disk=True), component("transformer", blocks=8), "can stream 2 to 8"),
        (
            PartialResidency(streamed=3, disk=True, low_cpu_mem_usage=True),
            component("transformer", blocks=8),
            "low_cpu_mem_usage is for blocks that are pinned",
        ),
        (
            PartialResidency(streamed=3, disk=True),
            component("transformer", blocks=8, disk_offload_refusal="torchao cannot be written"),
            "torchao cannot be written",
        ),
    ],
)
def test_what_cannot_be_is_refused(setting: PartialResidency, part: Any, words: str) -> None:
    assert words in str(setting.refusal(part, SPEC, card()))
    assert "needs a device with streams" in str(
        PartialResidency(streamed=3).refusal(component("transformer", blocks=8), SPEC, card(kind="mps"))
    )
    files = PartialResidency(streamed=3, disk=True)  # needs none
    assert files.refusal(component("transformer", blocks=8), SPEC, card(kind="mps")) is None
    assert files.unpinned() == files


def test_only_large_encoders_are_cut_unasked() -> None:
    """Their blocks in pinned memory or in files; a small one comes whole or not at all."""
    large, little = (component("text_encoder", size, role="text_encoder", blocks=8) for size in (9 * GIB, GIB))
    assert {(s.low_cpu_mem_usage, s.disk) for s in PartialResidency.variants(large)} == {(False, False), (False, True)}
    assert not list(PartialResidency.variants(little))
    assert not list(PartialResidency.variants(component("vae", 9 * GIB, role="vae", blocks=8)))
    assert PartialResidency(streamed=3).refusal(little, SPEC, card()) is None


def test_large_blocks_are_cut_into_their_pieces() -> None:
    unet = modules_of(small("sdxl-small"))["unet"]
    units = units_of(unet)
    assert len(units) > len(unet.down_blocks) + len(unet.up_blocks)
    inside = {id(child) for unit in units for child in unit.modules() if child is not unit}
    assert not inside & {id(unit) for unit in units}  # no piece holds another
    assert sum(map(module_bytes, units)) <= module_bytes(unet)
