"""A video that is decoded a few frames at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import vramplan
from tests.support.families import FAMILIES, make_family
from tests.support.specs import GIB, card, component
from vramplan.hardware.types import Hardware, Host
from vramplan.simulator.run import call_inputs
from vramplan.strategies.decode_chunk_size import DecodeChunkSize
from vramplan.workload import Workload

MACHINE = Hardware(accelerators=(card(8 * GIB),), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))
WORK = FAMILIES["stable-video"].workload


def planned(decode: str) -> tuple[Any, Any]:
    pipe = make_family("stable-video")
    size = {"height": WORK.height, "width": WORK.width, "num_frames": WORK.num_frames}
    settings = {"placement": "resident", "decode": decode}
    return pipe, vramplan.plan(pipe, device=MACHINE, settings=settings, **size)


def peak(plan: Any) -> Any:
    return next(phase for phase in plan.projected.phases if phase.name == "decode")


def test_fewer_frames_at_a_time_take_less() -> None:
    (_, whole), (_, chunked) = planned("plain"), planned("decode_chunk_size:frames=1")
    assert peak(chunked).activation_bytes < peak(whole).activation_bytes
    assert chunked.projected.basis == "simulated"
    assert chunked.quality == "near_lossless"


def test_the_real_pipeline_decodes_so_and_gives_it_up_again() -> None:
    pipe, plan = planned("decode_chunk_size:frames=1")
    seen: list[int] = []
    real = type(pipe.vae).decode

    def decode(self: Any, z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(z))
        return real(self, z, *args, **kwargs)

    type(pipe.vae).decode = decode
    try:
        applied = vramplan.apply_plan(pipe, plan, device="cpu")
        with torch.no_grad():
            chunked = pipe(**call_inputs(pipe, WORK))
        assert seen == [1] * WORK.num_frames
        assert "# call the pipeline with decode_chunk_size=1" in applied.calls
        applied.undo()
        assert "decode_latents" not in vars(pipe)
        seen.clear()
        with torch.no_grad():
            whole = pipe(**call_inputs(pipe, WORK))
        assert seen == [WORK.num_frames]
    finally:
        type(pipe.vae).decode = real
    assert torch.as_tensor(chunked.frames[0]).shape == torch.as_tensor(whole.frames[0]).shape


def test_only_where_it_acts() -> None:
    able = component("vae", role="vae", class_name="AutoencoderKLTemporalDecoder")
    video = replace(Workload(height=64, width=64), num_frames=5)
    assert [setting.frames for setting in DecodeChunkSize.variants(able, video)] == [4, 2, 1]
    assert "1 frame or more" in str(DecodeChunkSize(frames=5).refusal(able, video))
    assert "no decoding in chunks" in str(DecodeChunkSize().refusal(component("vae", role="vae"), video))
    assert not list(DecodeChunkSize.variants(component("vae", role="vae"), video))
    with pytest.raises(vramplan.UsageError, match="no decoding in chunks"):
        vramplan.plan("stable-diffusion-1.5", device=MACHINE, settings={"decode": "decode_chunk_size"}, simulate=False)
