"""Components that are streamed while they are loaded share one cache once there is a pipeline, also by printed code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vramplan
import vramplan.runtime.applied
import vramplan.runtime.staged
from tests.support.calls import call_kwargs, output_tensor
from vramplan.api.code import plan_code
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.modules import modules_of
from vramplan.runtime.staged import load_applied
from vramplan.streaming.attach import stream_of
from vramplan.units import GIB

CARD = Accelerator(kind="cuda", index=0, name="made-up card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))
SETTINGS = {
    "placement.transformer": "weight_streaming:streamed=3,keep=1,locked=2",
    "placement.text_encoder_2": "weight_streaming:streamed=4",
    "placement.vae": "weight_streaming:locked=1",
}


def caches(pipe: Any) -> int:
    streams = [stream for module in modules_of(pipe).values() if (stream := stream_of(module)) is not None]
    assert len(streams) == len(SETTINGS)
    return len({id(stream.cache) for stream in streams})


@pytest.mark.usefixtures("_quiet_libraries")
def test_what_is_streamed_while_it_is_loaded_shares_one_cache(small_folder: Any, monkeypatch: Any) -> None:
    folder = Path(small_folder("flux-small"))
    for place in (vramplan.runtime.applied, vramplan.runtime.staged):
        monkeypatch.setattr(place, "planned_accelerator", lambda plan, device: plan.machine.accelerator)
    plan = vramplan.plan(folder, device=MACHINE, height=64, width=64, settings=SETTINGS, simulate=False)
    loaded = load_applied(plan, folder, lambda _: call_kwargs("flux-small"), device="cpu", say=lambda _: None)
    pipe = loaded.applied.pipe
    pipe.set_progress_bar_config(disable=True)
    assert caches(pipe) == 1
    planned = output_tensor(loaded())
    assert loaded.applied.undo() is pipe
    assert torch.equal(output_tensor(pipe(**call_kwargs("flux-small"))), planned)
    names: dict[str, Any] = {}
    exec(plan_code(plan).replace("cuda:0", "cpu"), names)
    by_code = names["pipe"]
    by_code.set_progress_bar_config(disable=True)
    assert caches(by_code) == 1
    assert torch.equal(output_tensor(by_code(**call_kwargs("flux-small"))), planned)
