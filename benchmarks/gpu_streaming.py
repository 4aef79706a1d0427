"""Weight streaming on a real CUDA card beside diffusers' own calls: full-size pipelines of random weights, no download.

    python benchmarks/gpu_streaming.py -o benchmarks/results/gpu-streaming-NAME-DATE.json [--minutes 8] [--only TEXT]

Each case is one placement, called for a few steps. Read are: seconds of a step, against the longer of computing
(resident) and copying (at the rate of a bare page-locked copy of the same bytes); the rate of the copies; peaks of the
phases, beside the simulated ones; whether latents and pictures have the same bits as resident; page-locked memory; how
long it takes to put on and to undo. Plans for smaller cards run with as little memory as those have. The file is
written after every case, most valuable ones first, and a case that is in it is skipped: a run that was cut off is
started again. `--simulate` adds simulated peaks to a file, for which no card is needed. `--pretend` runs everything
with small pipelines on the CPU, where no figure means anything.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from gpu_accuracy import Models, machine, project
from gpu_streaming_cases import PLANNED, PLANS, STOCK, VIDEO, WORKLOADS, Case, cases, derived, summary
from gpu_streaming_machine import Card, Copies, Device, Full, Masters, Pretend, Small, map_file

import vramplan
from vramplan.common.files import write_text
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.geometry import module_bytes, units_of
from vramplan.simulator.run import call_inputs
from vramplan.strategies.base import Placed, apply_settings
from vramplan.strategies.settings import format_setting, grouped, parse_placement
from vramplan.strategies.weight_streaming import WeightStreaming
from vramplan.streaming import attach
from vramplan.streaming.division import worth_streaming
from vramplan.units import GIB

STEPS = 4


class Bench:
    """The device, the models loaded so far, and the resident results that others must equal."""

    def __init__(self, device: Device, scratch: Path) -> None:
        self.device = device
        self.scratch = scratch
        self.expected: dict[str, list[bytes]] = {}
        self._models: dict[str, Models] = {}

    @property
    def pretend(self) -> bool:
        return isinstance(self.device, Pretend)

    def model(self, name: str, *, weights: bool = True) -> Any:
        found = self._models.setdefault(name, Small() if self.pretend else Full())
        if weights:
            found.load(name)  # nothing if it is loaded
        elif found.source is None:
            found.describe(name)
        return found


def run_case(case: Case, bench: Bench) -> dict[str, Any]:
    start = time.perf_counter()
    model = bench.model(case.model)
    pipe, work = model.pipeline(), model.workload(WORKLOADS.get(case.model, {}))
    row: dict[str, Any] = {"load_seconds": time.perf_counter() - start}
    masters = Masters(pipe)
    if not case.streams:  # the next one page-locks again; streamed ones in a row use the same memory
        bench.device.clean()
    try:
        if case.form in PLANS:
            _planned(case, pipe, work, bench, row)
        else:
            _placed(case, pipe, work, bench, row)
    except torch.OutOfMemoryError as error:
        row["out_of_memory"] = str(error)[:300]
    finally:
        bench.device.limit(None)
        masters.restore()
        bench.device.synchronize()
    return row


def _placed(case: Case, pipe: Any, work: Any, bench: Bench, row: dict[str, Any]) -> None:
    device, copies, name = bench.device, Copies(bench.device), denoiser_of(pipe)
    if case.host == "file":
        with timed(row, "save_seconds", device):
            map_file(getattr(pipe, name), bench.scratch / f"{case.model}.safetensors")
    with divided(case), copies.watching():
        placed = placement(case, bench.model(case.model), getattr(pipe, name), stream=not bench.pretend)
        device.restart()
        try:
            with timed(row, "apply_seconds", device):
                apply_settings(pipe, placed, [], device.name)
            measure(case, pipe, work, bench, copies, row)
            if case.streams:
                row["bare_bytes_per_s"] = bare_rate(getattr(pipe, name), device)
        finally:
            with timed(row, "undo_seconds", device):
                for setting, names in placed:
                    setting.remove(pipe, names)


def _planned(case: Case, pipe: Any, work: Any, bench: Bench, row: dict[str, Any]) -> None:
    """The plan that vramplan makes for a smaller card, on as little memory."""
    device, copies, size = bench.device, Copies(bench.device), PLANNED[case.model]
    options: dict[str, Any] = {"height": work.height, "width": work.width, "stock": case.form == "stock plan"}
    options |= {"num_frames": work.num_frames} if case.model == VIDEO else {}
    with timed(row, "plan_seconds", device):
        plan = vramplan.plan(pipe, device=device.hardware(), vram=f"{size}GiB", **options)
    row["plan"] = dict(plan.settings.placement)
    row["decode"] = list(plan.settings.decode)
    row["budget_bytes"] = plan.machine.budget.vram_bytes
    row["projected_peak_bytes"] = plan.projected.vram_reserved_bytes
    device.limit(size * GIB)
    with copies.watching():
        device.restart()
        with timed(row, "apply_seconds", device):
            applied = vramplan.apply_plan(pipe, plan, device="cpu" if bench.pretend else None)
        try:
            row["notes"] = list(applied.notes)
            measure(case, pipe, work, bench, copies, row)
        finally:
            with timed(row, "undo_seconds", device):
                applied.undo()


def measure(case: Case, pipe: Any, work: Any, bench: Bench, copies: Copies, row: dict[str, Any]) -> None:
    """Call the pipeline, and read what the call took."""
    device, marks, counted = bench.device, [], []
    row |= {"locked_bytes": copies.locked_bytes, "denoiser_bytes": module_bytes(getattr(pipe, denoiser_of(pipe)))}
    phases: dict[str, dict[str, int]] = {}
    latents: list[torch.Tensor] = []

    def end_phase(name: str) -> None:
        phases[name] = {key: device.peak(key) for key in ("allocated", "reserved")}
        device.restart()

    def first_forward(module: Any, given: Any) -> None:
        if "encode" not in phases:
            end_phase("encode")

    def step_end(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        marks.append(device.mark())
        counted.append(copies.streamed_bytes)
        if len(marks) == STEPS:
            latents.append(kwargs["latents"].cpu())
            end_phase("denoise")
        return {}

    inputs = call_inputs(pipe, work) | {"num_inference_steps": STEPS, "callback_on_step_end": step_end}
    # the first call of a process starts libraries: the resident one is made twice
    for _ in range(2 if case.form == "resident" else 1):
        for several in (marks, counted, latents, phases):
            several.clear()
        hook = getattr(pipe, denoiser_of(pipe)).register_forward_pre_hook(first_forward, prepend=True)
        try:
            with timed(row, "call_seconds", device), torch.no_grad():
                made = pipe(**inputs, generator=torch.Generator("cpu").manual_seed(0))
        finally:
            hook.remove()
        end_phase("decode")
    pictures = torch.as_tensor(made.images if hasattr(made, "images") else made.frames)
    found = [bytes_of(tensor) for tensor in (*latents, pictures)]
    expected = bench.expected.setdefault(case.model, found)
    row |= {"latents_equal": found[:-1] == expected[:-1], "pictures_equal": found[-1] == expected[-1]}
    row["finite"] = all(bool(tensor.isfinite().all()) for tensor in latents)
    row["step_seconds"] = [device.seconds(a, b) for a, b in pairwise(marks)]
    row["streamed_bytes_per_step"] = [b - a for a, b in pairwise(counted)]
    row["page_locked"] = device.page_locked()
    row["copy_bytes_per_s"] = copies.rate("copy" if case.host == "locked" else "gather")
    row["phases"] = phases


def placement(case: Case, model: Any, denoiser: torch.nn.Module, *, stream: bool) -> Placed:
    """The settings of a case. Components other than the denoiser come for their phase, from pageable memory, or stay
    on the device beside diffusers' group offloading."""
    head, rest = _settings(case, denoiser)
    if not stream:  # diffusers refuses streams without a card
        head = head.replace(",stream=true", "").replace(":stream=true", "")
    return grouped(
        {
            part.name: parse_placement(head if part.role == "denoiser" else rest).complete(part)
            for part in model.source.spec.components
        }
    )


def _settings(case: Case, denoiser: torch.nn.Module) -> tuple[str, str]:
    if not case.streams:
        head = STOCK.get(case.form, case.form)
        return head, "resident" if head.startswith("group_offload") else head
    sizes = [module_bytes(unit) for unit in attach.units_of(denoiser)]
    most = len(worth_streaming(sizes))
    streamed = {"blocks": most, "leaves": most, "half": most // 2, "whole": 0}[case.form]
    setting = WeightStreaming(streamed=streamed, locked=len(sizes) if case.host == "locked" else 0)
    return format_setting(setting), WeightStreaming.name


@contextmanager
def divided(case: Case) -> Iterator[None]:
    """Let weight streaming divide a module into its leaves, finer than it would."""
    division = leaves_of if case.form == "leaves" else units_of
    with patch.object(attach, "units_of", division):
        yield


def leaves_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    return [child for child in module.modules() if not list(child.children()) and list(child.parameters())]


def denoiser_of(pipe: Any) -> str:
    return "unet" if "unet" in pipe.components else "transformer"


def bare_rate(module: torch.nn.Module, device: Device) -> float | None:
    """Bytes per second of copying the streamed weights to the device with nothing around it, the best of three: from
    where they are page-locked, or tensor by tensor."""
    stream = attach.stream_of(module)
    assert stream is not None
    assert stream.member is not None
    blocks = [block for block in stream.member.blocks if block.size]
    buffer = torch.empty(max(block.size for block in blocks), dtype=torch.uint8, device=device.name)
    rates = []
    for _ in range(3):
        start = device.mark()
        for block in blocks:
            for chunk, there, here, size in block.segments:
                buffer[here : here + size].copy_(chunk[there : there + size], non_blocking=True)
            for offset, tensor in () if block.segments else zip(block.offsets, block.tensors, strict=True):
                stream.cache.backend.view(buffer, offset, tensor).copy_(tensor)
        rates.append(sum(block.size for block in blocks) / device.seconds(start, device.mark()))
    return max(rates)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


@contextmanager
def timed(row: dict[str, Any], key: str, device: Device) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
        device.synchronize()
    finally:
        row[key] = time.perf_counter() - start


def simulate(case: Case, bench: Bench, card: str) -> dict[str, Any]:
    """The simulated peaks of a case on a card of this name, without one."""
    model = bench.model(case.model, weights=False)
    modules = model.source.parts.modules
    name = "unet" if "unet" in modules else "transformer"
    with divided(case):
        placed = placement(case, model, modules[name], stream=True)
        work = model.workload(WORKLOADS.get(case.model, {}))
        return project(
            model.source, placed, [], work, Accelerator(kind="cuda", index=0, name=card, total_bytes=0, free_bytes=None)
        )


def pending(found: dict[str, Any], wanted: list[Case]) -> list[Case]:
    """Cases not measured yet, with the resident one of their model before them: bits are compared in one process."""
    missing = [case for case in wanted if case.name not in found["cases"]]
    models = {case.model for case in missing}
    return [case for case in wanted if case in missing or (case.form == "resident" and case.model in models)]


def unsimulated(found: dict[str, Any], wanted: list[Case]) -> list[Case]:
    measured = {name for name, row in found["cases"].items() if "phases" in row and "simulated" not in row}
    return [case for case in wanted if case.name in measured and case.form not in PLANS]


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return run()
    except Exception as error:  # one broken case must not cost the others
        return {"error": f"{type(error).__name__}: {error}"[:300]}


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--minutes", type=float, default=8.0, show_default=True, help="Start no case after so long.")
@click.option("--only", default="", help="Only cases with this in their name.")
@click.option("--pretend", is_flag=True, help="Small pipelines on the CPU: no figure means anything.")
@click.option("--simulate", "simulating", is_flag=True, help="Only add simulated peaks to the file: needs no card.")
def main(output: Path, minutes: float, only: str, pretend: bool, simulating: bool) -> None:
    end = time.monotonic() + 60 * minutes
    device = Pretend() if pretend else Card()
    found = json.loads(output.read_text()) if output.exists() else {"cases": {}}
    if "machine" not in found:
        found |= {"machine": {"device": "pretended"} if pretend else machine(), "link": device.link()}
    wanted = [case for case in cases() if only in case.name]

    def keep(case: Case, row: dict[str, Any]) -> None:
        found["cases"][case.name] = row
        found["figures"] = {case.name: derived(case, found) for case in cases()}
        write_text(output, json.dumps(found, indent=1))
        click.echo(
            f"{(end - time.monotonic()) / 60:5.1f} minutes left  {case.name}{' simulated' * ('simulated' in row)}"
        )

    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(device, Path(scratch))
        for case in [] if simulating else pending(found, wanted):
            if time.monotonic() < end:
                keep(case, attempt(partial(run_case, case, bench)))
        for case in unsimulated(found, wanted):
            if time.monotonic() < end or simulating:
                made = attempt(partial(simulate, case, bench, found["machine"]["device"]))
                keep(case, found["cases"][case.name] | {"simulated": made})
    if pending(found, wanted) or unsimulated(found, wanted):
        click.echo("out of time: start again to go on")
    click.echo(summary(found, cases()))


if __name__ == "__main__":
    main()
