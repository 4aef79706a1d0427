"""Weights in files: the same pictures, everything back afterwards, nothing left behind."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from make_pipeline import build

from tests.support.calls import call_kwargs, output_tensor
from tests.support.simulated import small_model
from tests.support.specs import GIB, budget, card, component, pipeline, text_to_image
from vramplan.errors import NothingFitsError, VramplanError
from vramplan.pipeline.describe import describe
from vramplan.pipeline.modules import modules_of
from vramplan.planner.decide import decide
from vramplan.planner.fixed import parse_fixed
from vramplan.planner.footprint import AssumedFootprint
from vramplan.strategies import disk
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.settings import grouped, parse_placement
from vramplan.strategies.weight_streaming import WeightStreaming
from vramplan.workload import Workload, make_workload

SMALL = ("sd15-small", "sdxl-small", "flux-small", "cogvideox-small")
SPEC = text_to_image()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VRAMPLAN_OFFLOAD", str(tmp_path / "offload"))
    return tmp_path / "offload"


def small(kind: str) -> Any:
    pipe = build(kind)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    found = {f"{part}.{name}": t for part, m in modules_of(pipe).items() for name, t in m.state_dict().items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def _in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files read to memory of its own, as on any other device: the CPU adds differently where a file's are not
    aligned."""
    real = safetensors.torch.load_file

    def load(path: str, device: str = "cpu") -> dict[str, torch.Tensor]:
        return {key: tensor.clone() for key, tensor in real(path, device).items()}

    monkeypatch.setattr(safetensors.torch, "load_file", load)


def whole(part: Any) -> Any:
    return GroupOffload(disk=True).complete(part)


@pytest.mark.usefixtures("_in_memory")
@pytest.mark.parametrize("kind", SMALL)
def test_pictures_are_the_same_and_weights_come_back(kind: str, folder: Path) -> None:
    pipe = small(kind)
    plain, before = output_tensor(pipe(**call_kwargs(kind))), weights(pipe)
    spec = describe(pipe).spec
    able = {c.name: whole(c) for c in spec.components if c.role != "vae"}
    able = {n: setting for n, setting in able.items() if setting.refusal(spec.component(n), spec, card()) is None}
    assert able.keys() >= {c.name for c in spec.components if c.role == "denoiser"}
    for name, setting in able.items():
        setting.apply(pipe, [name], "cpu")
    assert sum(1 for _ in folder.rglob("*.safetensors")) > len(able)
    for _ in range(2):
        assert torch.equal(output_tensor(pipe(**call_kwargs(kind))), plain)
    for name, setting in able.items():
        setting.remove(pipe, [name])
    assert same(before, weights(pipe))
    assert list(folder.iterdir()) == []
    assert torch.equal(output_tensor(pipe(**call_kwargs(kind))), plain)


def test_a_component_that_goes_takes_its_files_with_it(folder: Path) -> None:
    pipe = small("sd15-small")
    GroupOffload(disk=True).apply(pipe, ["unet"], "cpu")
    assert list(folder.iterdir())
    del pipe
    import gc

    gc.collect()
    assert list(folder.iterdir()) == []


def test_a_process_that_was_killed_is_swept_up_after(folder: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = platform.node()
    left = f"vramplan-{host}-{gone.pid}-unet-0123abcd"
    others = {
        f"vramplan-{host}-{os.getpid()}-unet-0123abcd",
        f"vramplan-other{host}-{gone.pid}-unet-0123abcd",
        f"{gone.pid}-pictures-of-fish",
        str(gone.pid),
    }
    for name in (left, *others):
        (folder / name).mkdir(parents=True)
    with disk.own_folder(small("sd15-small").unet, "unet") as own:
        assert {path.name for path in folder.iterdir()} == others | {own.name}


def test_files_that_another_model_left_are_neither_read_nor_removed(folder: Path) -> None:
    pipe, other = small("sd15-small"), small("sd15-small")
    plain = output_tensor(pipe(**call_kwargs("sd15-small")))
    with torch.no_grad():
        for weight in other.unet.parameters():
            weight.mul_(2)
    GroupOffload(disk=True).apply(other, ["unet"], "cpu")
    (first,) = folder.iterdir()
    left = shutil.copytree(first, folder / "left-by-another")
    for path in first.iterdir():
        shutil.copy(path, folder)  # as diffusers names them, where a folder is given to it
    before = {path: path.read_bytes() for path in (*left.iterdir(), *folder.glob("*.safetensors"))}
    assert len(before) == 2 * len(list(first.iterdir())) > 2
    GroupOffload(disk=True).apply(pipe, ["unet"], "cpu")
    torch.testing.assert_close(output_tensor(pipe(**call_kwargs("sd15-small"))), plain)
    GroupOffload(disk=True).remove(pipe, ["unet"])
    assert torch.equal(output_tensor(pipe(**call_kwargs("sd15-small"))), plain)
    assert {path: path.read_bytes() for path in before} == before


def test_too_little_room_is_said_before_anything_is_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = small("sd15-small")
    before = weights(pipe)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        VramplanError, match=r"1000 B free on the disk, .* needed to offload unet; set VRAMPLAN_OFFLOAD"
    ):
        GroupOffload(disk=True).apply(pipe, ["unet"], "cpu")
    assert same(before, weights(pipe))
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VRAMPLAN_OFFLOAD", str(tmp_path / "file" / "x"))
    match = "weights cannot be offloaded there: Not a directory"
    with pytest.raises(VramplanError, match=match), disk.own_folder(small("sd15-small").unet, "unet"):
        pass


@pytest.mark.parametrize("writes", [0, 1, 3])
def test_a_disk_that_fails_half_way_loses_nothing(writes: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = small("flux-small")
    plain, before = output_tensor(pipe(**call_kwargs("flux-small"))), weights(pipe)
    setting = whole(describe(pipe).spec.component("text_encoder_2"))
    left = [writes]
    real = safetensors.torch.save_file

    def save(tensors: Any, path: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    with pytest.raises(VramplanError, match="text_encoder_2 cannot be offloaded there: No space left"):
        setting.apply(pipe, ["text_encoder_2"], "cpu")
    setting.remove(pipe, ["text_encoder_2"])
    assert same(before, weights(pipe))
    assert list(folder.iterdir()) == []
    assert torch.equal(output_tensor(pipe(**call_kwargs("flux-small"))), plain)


def test_the_simulation_keeps_weights_out_of_ram_and_writes_nothing(folder: Path) -> None:
    spec = small_model("flux-small").spec
    work = make_workload({}, {"height": 64, "width": 64})

    def run(text: str) -> Any:
        told = {c.name: "resident" if c.role == "vae" else text for c in spec.components}
        placement = {name: parse_placement(text).complete(spec.component(name)) for name, text in told.items()}
        return small_model("flux-small").run(work, grouped(placement), [], accelerator=card())

    plain, files = run("group_offload"), run("group_offload:disk=true")
    assert files.peak_reserved_bytes == plain.peak_reserved_bytes
    assert [use.flops for use in files.uses] == [use.flops for use in plain.uses]
    assert files.to_host_bytes < plain.to_host_bytes
    assert not folder.exists()


def test_files_of_its_own_are_never_needed_where_the_weights_are_files() -> None:
    """Little RAM: an encoder is streamed from the files it is loaded from, with nothing written beside them."""
    spec = pipeline(
        component("text_encoder", 9 * GIB, role="text_encoder", blocks=24),
        component("transformer", 6 * GIB, blocks=16),
        component("vae", GIB // 4, role="vae"),
    )
    work = Workload(height=512, width=512)
    footprint = AssumedFootprint(spec=spec, workload=work)

    def chosen(ram: int, room: int | None = None, **settings: str) -> Any:
        limits = replace(budget(8 * GIB, ram), disk_bytes=room)
        fixed = parse_fixed({f"placement.{name}": text for name, text in settings.items()}, spec)
        return decide(spec, work, limits, accelerator=card(8 * GIB), footprint=footprint, fixed=fixed).chosen

    assert chosen(64 * GIB).demand.disk_bytes == 0
    tight = chosen(6 * GIB)
    assert isinstance(tight.placement["text_encoder"], WeightStreaming)
    assert tight.demand.disk_bytes == 0
    assert tight.demand.ram_bytes <= 6 * GIB
    with pytest.raises(NothingFitsError, match=r"of disk, 8\.00 GiB may be used"):
        chosen(6 * GIB, room=8 * GIB, text_encoder="group_offload:disk=true")


@pytest.mark.parametrize("options", [{"stream": True}, {"type": "leaf"}])
def test_only_blocks_without_streams_go_to_disk(options: Any) -> None:
    setting = GroupOffload(disk=True, **options)
    assert "disk=true is for type=block" in str(setting.refusal(component("transformer", blocks=4), SPEC, card()))
