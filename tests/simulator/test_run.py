"""Whole pipelines on the simulated device, under every strategy of the registry."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vramplan
from tests.support.calls import workload_of
from tests.support.simulated import small_model
from vramplan.api.plan import describe
from vramplan.common import cache
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.sources import Live
from vramplan.planner.decision import Decision
from vramplan.planner.fixed import parse_fixed
from vramplan.profiles.catalogue import device_accelerator, load_device_profile
from vramplan.simulator.alternatives import Alternatives
from vramplan.simulator.cost_model import cost_model
from vramplan.simulator.model import SimulatedModel
from vramplan.simulator.parts import parts_from_live, parts_from_profile
from vramplan.simulator.run import run_simulation
from vramplan.simulator.types import Simulation
from vramplan.strategies.resident import Resident
from vramplan.strategies.settings import grouped, parse_decode, parse_placement
from vramplan.units import GIB, MIB
from vramplan.workload import Workload

SMALL = ("sd15-small", "sdxl-small", "flux-small", "cogvideox-small")
CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))


def simulated(kind: str, placement: str, decode: tuple[str, ...] = ()) -> Simulation:
    spec = small_model(kind).spec
    setting = parse_placement(placement)
    placed = {}
    for component in spec.components:
        mine = setting.complete(component)
        refused = mine.refusal(component, spec, CARD)
        placed[component.name] = parse_placement("resident") if refused else mine
    decodes = [(parse_decode(text), [vae.name for vae in spec.vaes]) for text in decode]
    return small_model(kind).run(workload_of(kind), grouped(placed), decodes, accelerator=CARD)


@pytest.mark.diagonal("kind", "placement")
@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize(
    "placement",
    [
        "resident",
        "model_cpu_offload",
        "sequential_cpu_offload",
        "group_offload",
        "group_offload:blocks=2",
        "group_offload:stream=true",
        "group_offload:stream=true,record_stream=true",
        "group_offload:stream=true,low_cpu_mem_usage=true",
        "group_offload:type=leaf",
        "group_offload:type=leaf,stream=true",
    ],
)
def test_every_placement_runs_and_its_weights_are_what_was_priced(kind: str, placement: str) -> None:
    spec = small_model(kind).spec
    result = simulated(kind, placement)
    assert result.stopped is None
    assert [phase.name for phase in result.phases if phase.name != "load"] == ["encode", "denoise", "decode"]
    total = spec.weight_bytes
    denoise = next(phase for phase in result.phases if phase.name == "denoise")
    if placement == "resident":
        assert total <= denoise.weights_bytes <= total * 1.3  # small tensors are rounded up to 512 bytes
        assert result.host_peak_bytes >= total
    else:
        assert denoise.weights_bytes < total
    if "stream" in placement and "low_cpu" not in placement:
        assert result.pinned_peak_bytes > 0
    assert isinstance(spec.source, Live)
    assert spec.source.pipe.components["vae"].device.type == "cpu"  # the live pipeline was only read


@pytest.mark.parametrize("kind", SMALL)
def test_the_loop_is_the_same_whatever_the_placement(kind: str) -> None:
    resident, offloaded = (simulated(kind, name) for name in ("resident", "model_cpu_offload"))
    for use in filter(lambda item: item.component, resident.uses):
        other = offloaded.use(use.phase, use.component)
        assert other is not None
        assert other.flops == use.flops


@pytest.mark.parametrize("kind", SMALL)
def test_what_modules_compute_is_what_their_components_do(kind: str) -> None:
    result = simulated(kind, "resident")
    for part in {use.component for use in result.uses}:
        uses = [use for use in result.uses if use.component == part]
        inside = [module for module in result.modules if module.name.partition(".")[0] == part]
        assert sum(module.flops for module in inside) == pytest.approx(sum(use.flops for use in uses))
        assert sum(module.launches for module in inside) == sum(use.launches for use in uses)
    heaviest = max(result.modules, key=lambda module: module.flops)
    assert heaviest.name.count(".") > 1


def test_tiling_lowers_the_decode() -> None:
    plain = simulated("cogvideox-small", "resident")
    tiled = simulated("cogvideox-small", "resident", ("vae_slicing", "vae_tiling"))
    first, second = plain.use("decode", "vae"), tiled.use("decode", "vae")
    assert first is not None
    assert second is not None
    assert second.need_bytes < first.need_bytes


def test_flux_takes_what_was_measured() -> None:
    """Published: 33.85 GiB allocated and 36.17 reserved; 22.64 with model offload (diffusers pull request 11682)."""
    parts, work = parts_from_profile("flux.1-dev"), Workload(height=1024, width=1024)
    resident = run_simulation(parts, work, lambda pipe: pipe.to("cuda"))
    assert resident.peak_allocated_bytes / GIB == pytest.approx(33.85, rel=0.01)
    assert resident.peak_reserved_bytes / GIB == pytest.approx(36.17, rel=0.02)
    offloaded = run_simulation(parts, work, lambda pipe: pipe.enable_model_cpu_offload(device="cuda:0"))
    assert offloaded.peak_allocated_bytes / GIB == pytest.approx(22.64, rel=0.01)


@pytest.mark.parametrize(("mib", "lacks"), [(12, True), (24, False)])
def test_too_small_a_device_says_where_it_ran_out(small_pipeline: Callable[..., Any], mib: int, lacks: bool) -> None:
    """By how much at least; by none where as much is free, in pieces too small."""
    parts = parts_from_live(small_pipeline("sd15-small"))
    result = run_simulation(parts, workload_of("sd15-small"), lambda pipe: pipe.to("cuda"), capacity_bytes=mib * MIB)
    assert result.fits is False
    assert result.stopped is not None
    assert "out of memory in" in result.stopped
    assert (result.short_bytes > 0) == lacks
    assert result.over_bytes > 0
    assert result.over_bytes >= result.short_bytes
    assert result.stopped_in in ("load", "encode", "denoise", "decode")
    assert f"({result.stopped_in})" in result.stopped


def test_the_chosen_plan_was_confirmed_within_the_budget(small_pipeline: Callable[..., Any]) -> None:
    pipe = small_pipeline("flux-small")
    plan = vramplan.plan(pipe, device=MACHINE, vram="48MiB", height=64, width=64)
    again = vramplan.simulate(pipe, plan, capacity_bytes=plan.machine.budget.vram_bytes)
    assert again.fits
    assert again.peak_reserved_bytes == plan.projected.vram_reserved_bytes
    assert plan.projected.basis == "simulated"


def test_an_answer_is_kept_and_a_damaged_one_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path))
    first = simulated("sd15-small", "resident")
    (kept,) = tmp_path.iterdir()
    assert simulated("sd15-small", "resident") == first
    for damage in (b"", b"{}", kept.read_bytes()[:100], json.dumps({"peak_allocated_bytes": 1}).encode()):
        kept.write_bytes(damage)
        again = simulated("sd15-small", "resident")
        assert again.peak_reserved_bytes == first.peak_reserved_bytes
        assert simulated("sd15-small", "resident") == again  # and the entry is whole


def test_another_picture_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path))
    source = SimulatedModel(small_model("sd15-small").spec)  # to which nothing is known
    for side in (64, 128):
        source.run(Workload(height=side, width=side), [], [], accelerator=None)
    assert len(list(tmp_path.iterdir())) == 4  # a simulation and a trace each


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path / "file"))
    assert simulated("sd15-small", "resident").stopped is None
    monkeypatch.setenv("VRAMPLAN_CACHE", "0")
    assert cache.cache_folder() is None


def test_expandable_segments_reserve_less(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = simulated("sdxl-small", "resident")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    expandable = simulated("sdxl-small", "resident")
    assert expandable.peak_allocated_bytes == fixed.peak_allocated_bytes
    assert expandable.peak_reserved_bytes < fixed.peak_reserved_bytes


@pytest.mark.parametrize(("dtype", "matter"), [("float32", ()), ("bfloat16", ("bfloat16",))])
def test_what_other_cards_had_recorded_serves_and_makes_no_difference(
    small_pipeline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, dtype: str, matter: tuple[str, ...]
) -> None:
    monkeypatch.setenv("VRAMPLAN_CACHE", "0")
    pipe, work = small_pipeline("flux-small", torch_dtype=getattr(torch, dtype)), workload_of("flux-small")
    spec = describe(pipe).spec
    cards = [device_accelerator(load_device_profile(name)) for name in ("t4", "rtx-4090", "h100-80gb")]
    source = SimulatedModel(spec)
    assert [source.kernels(card)["math_dtypes"] for card in cards] == [matter, (), ()]
    found = [source.run(work, [], [], accelerator=card) for card in cards]
    alone = [SimulatedModel(spec).run(work, [], [], accelerator=card) for card in cards]
    assert [replace(item, wall_seconds=0) for item in found] == [replace(item, wall_seconds=0) for item in alone]
    held = [item.peak_allocated_bytes for item in found]
    assert held[2] == held[1] + 24 * MIB  # what cuBLAS holds on Hopper
    assert (held[0] == held[1]) == (not matter)


@pytest.mark.parametrize(
    ("stopped_in", "vae_in", "runs"),
    [("denoise", None, 1), ("load", None, 1), ("denoise", "encode", 3), ("encode", None, 3), ("decode", "decode", 3)],
)
def test_where_memory_ran_out_before_any_vae_no_other_decode_is_simulated(
    monkeypatch: pytest.MonkeyPatch, stopped_in: Any, vae_in: str | None, runs: int
) -> None:
    source, work = small_model("sd15-small"), workload_of("sd15-small")
    spec = source.spec
    found = cost_model(Alternatives(source), work, CARD, (), parse_fixed({}, spec, CARD))
    assert found.simulate is not None
    plain = source.run(work, [], [], accelerator=CARD)
    uses = tuple(use for use in plain.uses if use.component != "vae" or use.phase == vae_in)
    uses += (replace(uses[0], phase="encode", component="vae"),) if vae_in == "encode" else ()
    stopped = replace(plain, stopped="out of memory", stopped_in=stopped_in, uses=uses)
    made: list[int] = []
    monkeypatch.setattr(source, "replayed", lambda *_, **__: None)
    monkeypatch.setattr(source, "run", lambda *_, capacity_bytes, **__: made.append(capacity_bytes) or stopped)
    placement = {component.name: Resident() for component in spec.components}
    for capacity in (100, 200):
        for decode in ((), (parse_decode("vae_slicing"),), (parse_decode("vae_tiling:tile=32"),)):
            way = Decision(placement=placement, decode=decode, demand=None, verdict="fits", reason="", deficit_bytes=0)  # type: ignore[arg-type]
            assert found.simulate(way, capacity) is stopped
    assert made == [100] * runs + [200] * runs
    for setting in ("model_cpu_offload", "group_offload"):  # another placement is another call
        found.simulate(replace(way, placement=dict.fromkeys(placement, parse_placement(setting))), 200)
    assert len(made) == 2 * runs + 2
