"""Partial residency: priced as it is, the same pictures, and taken off again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import call_kwargs
from hypothesis import given
from hypothesis import strategies as st
from make_pipeline import build
from planner.specs import card, component, text_to_image

from vramplan.models import describe
from vramplan.pipeline.geometry import module_bytes, units_of
from vramplan.pipeline.live import modules_of
from vramplan.simulator.source import Source
from vramplan.strategies.base import remove_group_hooks
from vramplan.strategies.partial_residency import PartialResidency, apply_partial_residency, spread
from vramplan.strategies.settings import grouped, parse_placement
from vramplan.workload import make_workload

SMALL = {"sd15-small": "unet", "sdxl-small": "unet", "flux-small": "transformer"}
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
    return Source(pipe, spec).run(work, grouped(placement), [], accelerator=card()), spec.component(name)


@pytest.mark.parametrize("kind", SMALL)
def test_what_is_on_the_device_is_what_was_priced(kind: str) -> None:
    pipe = small(kind)
    name = SMALL[kind]
    most = next(iter(PartialResidency.variants(describe(pipe).spec.component(name)))).streamed
    resident, part = simulated(pipe, kind, name, "resident")
    before = next(phase for phase in resident.phases if phase.name == "denoise").weights_bytes
    for streamed in {3, most // 2, most} - {0, 1, 2}:
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


@pytest.mark.parametrize("kind", SMALL)
def test_pictures_are_the_same_bit_for_bit(kind: str) -> None:
    pipe, name = small(kind), SMALL[kind]

    def picture() -> torch.Tensor:
        return pipe(**call_kwargs(kind) | {"output_type": "pt"}).images

    plain = picture()
    modules = modules_of(pipe)
    apply_partial_residency(modules[name], "cpu", 3)
    hooked = [child for child in modules[name].modules() if hasattr(child, "_diffusers_hook")]
    assert len(hooked) == 4  # three blocks, and the module itself
    assert torch.equal(picture(), plain)
    remove_group_hooks(pipe, [name])
    assert all(child._diffusers_hook.get_hook("group_offloading") is None for child in hooked)
    assert torch.equal(picture(), plain)


@given(st.lists(st.integers(1, 100), min_size=3, max_size=80), st.data())
def test_streamed_blocks_are_spread_evenly(sizes: list[int], data: Any) -> None:
    worth = [place for place, size in enumerate(sizes) if size >= max(sizes) / 4]
    count = data.draw(st.integers(1, len(worth)))
    places = spread(sizes, count)
    assert len(set(places)) == count
    assert places == sorted(places)
    assert set(places) <= set(worth)
    ranks = [worth.index(place) for place in places]
    gaps = [after - before for before, after in zip([-1, *ranks], ranks, strict=False)]
    assert max(gaps) - min(gaps) <= 1
    with pytest.raises(ValueError, match="to stream"):
        spread(sizes, len(worth) + 1)


@given(st.integers(3, 60), st.data())
def test_fewer_streamed_blocks_take_more_memory_and_move_less(blocks: int, data: Any) -> None:
    part = component("transformer", blocks=blocks)
    low = data.draw(st.booleans())
    rungs = [setting for setting in PartialResidency.variants(part) if setting.low_cpu_mem_usage is low]
    assert len({setting.ladder for setting in rungs}) == 1
    holds = [setting.hold(part, SPEC) for setting in rungs]
    assert all((hold.pinned_bytes == 0) is low for hold in holds)
    assert [hold.running_bytes for hold in holds] == sorted(hold.running_bytes for hold in holds)
    assert [hold.moved_in_bytes for hold in holds] == sorted((hold.moved_in_bytes for hold in holds), reverse=True)
    assert all(hold.idle_bytes < hold.running_bytes <= part.weight_bytes for hold in holds)


@pytest.mark.parametrize(
    ("setting", "part", "words"),
    [
        (PartialResidency(streamed=2), component("transformer", blocks=8), "can stream 3 to 8"),
        (PartialResidency(streamed=9), component("transformer", blocks=8), "can stream 3 to 8"),
        (PartialResidency(streamed=3), component("transformer", blocks=2), "has 2 blocks worth streaming"),
        (PartialResidency(streamed=3), component("vae", role="vae", blocks=8), "a VAE cannot be streamed"),
    ],
)
def test_what_cannot_be_is_refused(setting: PartialResidency, part: Any, words: str) -> None:
    assert words in str(setting.refusal(part, SPEC, card()))
    assert "needs a device with streams" in str(
        PartialResidency(streamed=3).refusal(component("transformer", blocks=8), SPEC, card(kind="mps"))
    )


def test_large_blocks_are_cut_into_their_pieces() -> None:
    unet = modules_of(small("sdxl-small"))["unet"]
    units = units_of(unet)
    assert len(units) > len(unet.down_blocks) + len(unet.up_blocks)
    inside = {id(child) for unit in units for child in unit.modules() if child is not unit}
    assert not inside & {id(unit) for unit in units}  # no piece holds another
    assert sum(map(module_bytes, units)) <= module_bytes(unet)
