"""A pipeline that cannot be driven is planned from its components, traced one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import pytest
from calls import workload_of

import vramplan
from vramplan.hardware import Accelerator, Hardware, Host
from vramplan.models import describe
from vramplan.simulator.alone import traced_alone
from vramplan.simulator.kernels import Kernels
from vramplan.simulator.run import SimulationError
from vramplan.simulator.source import Source
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


def undriveable(small_pipeline: Callable[..., Any]) -> Any:
    return AsksForMemory(**small_pipeline("flux-small").components)


@pytest.mark.parametrize("kind", SMALL)
def test_alone_a_component_takes_what_it_takes_in_the_call(small_pipeline: Callable[..., Any], kind: str) -> None:
    pipe, work = small_pipeline(kind), workload_of(kind)
    source = Source(pipe, spec := describe(pipe).spec)
    plain = source.run(work, [], [], accelerator=None)
    alone = traced_alone(source.parts, spec, work, Kernels())
    assert [replace(item, stride=()) for item in alone.decoded] == [replace(item, stride=()) for item in plain.decoded]
    assert {use.component for use in alone.uses} == {use.component for use in spec.uses}
    for use in alone.uses:
        whole = plain.use(use.phase, use.component)
        assert whole is not None
        if use.component == "vae":
            assert use.need_bytes == pytest.approx(whole.need_bytes, rel=0.1)
        else:  # other lengths of text: the same within a few times, where rules of thumb are off by hundreds
            assert whole.need_bytes / 2 < use.need_bytes < whole.need_bytes * 8


def test_the_plan_says_what_stopped_the_call_and_lowers_its_basis(small_pipeline: Callable[..., Any]) -> None:
    pipe = undriveable(small_pipeline)
    with pytest.raises(SimulationError, match="stopped in"):
        vramplan.simulate(pipe, workload=workload_of("flux-small"))
    plan = vramplan.plan(pipe, device=MACHINE, vram="60MiB", height=64, width=64)
    assert plan.projected.basis == "derived"
    (note,) = [note for note in plan.notes if "one by one" in note]
    assert "the call stopped in" in note
    vramplan.apply_plan(pipe, plan, device="cpu").undo()


def test_tiling_is_priced_from_the_decode_alone(small_pipeline: Callable[..., Any]) -> None:
    pipe = undriveable(small_pipeline)
    plain, tiled = (
        vramplan.plan(pipe, device=MACHINE, settings={"decode": decode}, height=64, width=64)
        for decode in (["plain"], ["vae_tiling:tile=32"])
    )
    peaks = [
        next(phase for phase in plan.projected.phases if phase.name == "decode").activation_bytes
        for plan in (plain, tiled)
    ]
    assert peaks[1] < peaks[0]
