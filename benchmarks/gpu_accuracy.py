"""Projected against measured on a real CUDA card, with full-size pipelines of random weights: nothing is downloaded.

    python benchmarks/gpu_accuracy.py -o benchmarks/results/gpu-NAME-DATE.json [--minutes 8] [--only TEXT] [--list]
    python benchmarks/gpu_accuracy.py -o /tmp/pretended.json --pretend

For each case the pipeline is built on the card, given one placement through vramplan's own strategies, called for
three steps, and read: peak allocated and reserved, allocator statistics, host peak, seconds per step. The same case
is simulated. Beside the cases it measures what the simulation has to assume: workspaces of convolutions and of
attention, the driver context, and the link. The file is written after every case, a case that is in it already is
skipped, one that runs out of memory is recorded as such: so a run that was cut off is simply started again.

`--pretend` runs all of it on the CPU with tiny pipelines of the same classes, which takes a minute: mistakes are found
before a card is at hand (and `tests/benchmarks` runs a part of it). There an error is not recorded but raised.
"""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from inspect import signature, unwrap
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import click
import torch
from gpu_accuracy_cases import Case, cases, summary

from vramplan.calibration.peaks import current_rss_bytes, peak_rss_bytes
from vramplan.common.files import write_text
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.describe import describe
from vramplan.simulator.kernels import Kernels
from vramplan.simulator.model import SimulatedModel
from vramplan.simulator.parts import parts_from_profile
from vramplan.simulator.run import call_inputs
from vramplan.simulator.types import SimulationError
from vramplan.strategies.base import apply_settings
from vramplan.strategies.settings import grouped, parse_decode, parse_placement
from vramplan.units import MIB
from vramplan.workload import Workload, make_workload

DEVICE = "cuda:0"
cuda: Any = torch.cuda
LINK_BYTES, PRODUCT_SIDE = 256 * MIB, 8192
# Random weights find nothing unsafe or everything; the measured pipelines go without.
LEFT_OUT = ("safety_checker",)


class Models:
    """The model of the cases at hand: built once, kept until another one is asked for."""

    def __init__(self) -> None:
        self.name = ""
        self.real: dict[str, torch.nn.Module] = {}
        self.source: SimulatedModel | None = None
        self.defaults: Any = {}

    def load(self, name: str) -> None:
        if name == self.name:
            return
        self.real.clear()
        clean()
        self.describe(name)
        for part, module in parts_from_profile(name).modules.items():
            if part not in LEFT_OUT:
                self.real[part] = filled(module)

    def describe(self, name: str) -> None:
        described = describe(name)
        kept = tuple(component for component in described.spec.components if component.name not in LEFT_OUT)
        self.name, self.defaults = name, described.defaults
        self.source = SimulatedModel(replace(described.spec, components=kept))
        for part in LEFT_OUT:
            self.source.parts.modules.pop(part, None)

    def pipeline(self) -> Any:
        """A new pipeline object on the same weights, all of them on the CPU and without hooks."""
        parts = parts_from_profile(self.name)
        takes = signature(parts.cls.__init__).parameters
        missing = dict.fromkeys([*LEFT_OUT, "feature_extractor", "image_encoder"])
        wanted = missing | {"requires_safety_checker": False} | dict(parts.others) | self.real
        pipe = parts.cls(**{key: value for key, value in wanted.items() if key in takes})
        pipe.set_progress_bar_config(disable=True)
        return pipe


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """The weightless module with small random weights: filled on the card, where it is quick, kept on the CPU."""
    module = module.to_empty(device=DEVICE)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
            else:
                tensor.zero_()
    return module.to("cpu").eval()


def pretend() -> None:
    """The CPU in place of the card, and everything small."""
    import gpu_pretended as small

    torch.Tensor.pin_memory = torch.Tensor.clone  # type: ignore[method-assign, assignment]
    globals().update(
        DEVICE="cpu", LINK_BYTES=MIB, PRODUCT_SIDE=64, cuda=small.PretendedCuda(), describe=small.small_description,
        parts_from_profile=small.small_parts, make_workload=small.small_workload,
        CONVOLUTIONS=small.few(CONVOLUTIONS), CONVOLUTIONS_3D=small.few(CONVOLUTIONS_3D),
        ATTENTION=small.few(ATTENTION),
    )  # fmt: skip


def clean() -> None:
    gc.collect()
    cuda.empty_cache()
    cuda.reset_peak_memory_stats()


def run_case(case: Case, models: Models) -> dict[str, Any]:
    models.load(case.model)
    assert models.source is not None
    spec = models.source.spec
    work = make_workload(models.defaults, case.workload)
    placement = {
        component.name: parse_placement(
            case.rest if case.rest and component.role != "denoiser" else case.head
        ).complete(component)
        for component in spec.components
    }
    if DEVICE == "cpu":
        from gpu_pretended import without_streams

        placement = {name: without_streams(setting, spec.component(name)) for name, setting in placement.items()}
    decodes = [(parse_decode(text), [vae.name for vae in spec.vaes]) for text in case.decode]
    measured = measure(models, grouped(placement), decodes, work)
    return {"measured": measured, "projected": project(models.source, grouped(placement), decodes, work)}


def project(
    source: SimulatedModel, placed: Any, decodes: Any, work: Workload, accelerator: Accelerator | None = None
) -> dict[str, Any]:
    """The simulation without a safety checker, as the measured pipeline has none."""
    try:
        found = source.run(work, placed, decodes, accelerator=accelerator)
    except SimulationError as error:
        return {"error": str(error)}
    return {
        "peak_allocated_bytes": found.peak_allocated_bytes,
        "peak_reserved_bytes": found.peak_reserved_bytes,
        "host_peak_bytes": found.host_peak_bytes,
        "pinned_peak_bytes": found.pinned_peak_bytes,
        "wall_seconds": found.wall_seconds,
        "flops": sum(use.flops for use in found.uses),
        "phases": [[phase.name, phase.peak_allocated_bytes, phase.operation] for phase in found.phases],
    }


def measure(models: Models, placed: Any, decodes: Any, work: Workload) -> dict[str, Any]:
    pipe = models.pipeline()
    clean()
    times: list[float] = []
    try:
        rss = current_rss_bytes()
        apply_settings(pipe, placed, decodes, DEVICE)
        cuda.synchronize()
        loaded = cuda.memory_allocated()
        start = time.perf_counter()
        with torch.no_grad():
            pipe(**call_inputs(pipe, work) | {"num_inference_steps": 3} | stepping(pipe, times))
        cuda.synchronize()
        stats = cuda.memory_stats()
        return {
            "peak_allocated_bytes": cuda.max_memory_allocated(),
            "peak_reserved_bytes": cuda.max_memory_reserved(),
            "loaded_bytes": loaded,
            "rss_before_bytes": rss,
            "peak_rss_bytes": peak_rss_bytes(),
            "seconds": time.perf_counter() - start,
            "seconds_between_steps": [b - a for a, b in pairwise(times)],
            "allocator": {key: stats[key] for key in sorted(stats) if key.endswith((".peak", "num_alloc_retries"))},
        }
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error)[:300]}
    finally:
        undo(pipe, placed)
        clean()


def stepping(pipe: Any, times: list[float]) -> dict[str, Any]:
    """Notes when each step ends, where the pipeline tells."""

    def note(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        cuda.synchronize()
        times.append(time.perf_counter())
        return {}

    takes = signature(unwrap(type(pipe).__call__)).parameters
    return {"callback_on_step_end": note} if "callback_on_step_end" in takes else {}


def undo(pipe: Any, placed: Any) -> None:
    for setting, names in placed:
        setting.remove(pipe, names)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.to("cpu")
            for switch in ("use_tiling", "use_slicing"):
                if hasattr(module, switch):
                    setattr(module, switch, False)


# ---- what the simulation assumes


@contextmanager
def growth(result: dict[str, int]) -> Iterator[None]:
    """Peak bytes allocated in the block beyond what was there before."""
    clean()
    before = cuda.memory_allocated()
    yield
    cuda.synchronize()
    result["growth_bytes"] = cuda.max_memory_allocated() - before


# Batch, channels in and out, side. The last five decide the rule of `Kernels.convolution_bytes`: FLUX.1's decoder with
# 4, 8 and 16 pictures, its last upsampler and the block behind it, below and above each limit.
CONVOLUTIONS = (
    (1, 128, 128, 1024), (1, 256, 256, 1024), (1, 512, 512, 512), (4, 128, 128, 512), (8, 128, 128, 512),
    (1, 320, 320, 128), (2, 640, 640, 64),
    (4, 256, 256, 1024), (4, 256, 128, 1024), (8, 256, 256, 1024), (8, 256, 128, 1024), (16, 256, 128, 1024),
)  # fmt: skip
# Channels, frames, height, width: HunyuanVideo's decoder, and a small one.
CONVOLUTIONS_3D = ((128, 16, 128, 128), (128, 32, 512, 768))
# Heads, tokens, head size.
ATTENTION = ((24, 4608, 128), (24, 17776, 64), (8, 4096, 40), (10, 4096, 64), (32, 1024, 128))


def convolutions() -> list[dict[str, Any]]:
    shapes = [((batch, given, side, side), made) for batch, given, made, side in CONVOLUTIONS]
    shapes += [((1, *shape), shape[0]) for shape in CONVOLUTIONS_3D]
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    layouts = (False, True)
    return [convolution(*shape, dtype, last) for shape in shapes for dtype in dtypes for last in layouts]


def convolution(shape: tuple[int, ...], channels: int, dtype: torch.dtype, last: bool) -> dict[str, Any]:
    """What one convolution allocates, its output included, beside what the rule says of its workspace."""
    flat = len(shape) == 4
    kind = torch.nn.Conv2d if flat else torch.nn.Conv3d
    layout = (torch.channels_last if flat else torch.channels_last_3d) if last else torch.contiguous_format
    size = torch.finfo(dtype).bits // 8 * prod(shape)
    row: dict[str, Any] = {"shape": list(shape), "channels_out": channels, "dtype": str(dtype), "layout": str(layout)}
    if 4 * size > cuda.mem_get_info()[0]:
        return row | {"left_out": "too large for this card"}
    conv = kind(shape[1], channels, 3, padding=1, device=DEVICE, dtype=dtype)
    given = torch.empty(shape, device=DEVICE, dtype=dtype, memory_format=layout).zero_()
    try:
        with torch.no_grad(), growth(row):
            made = conv(given)
    except RuntimeError as error:
        return row | {"stopped": str(error)[:200]}
    row["output_bytes"] = made.numel() * made.element_size()
    row["workspace_bytes"] = row["growth_bytes"] - row["output_bytes"]
    tf32 = cuda.get_device_capability() >= (8, 0)
    row["projected_bytes"] = Kernels(tf32=tf32).convolution_bytes(given, made)
    return row


def attention() -> list[dict[str, Any]]:
    found = []
    for heads, length, size in ATTENTION:
        for dtype in (torch.bfloat16, torch.float32):
            for masked in (False, True):
                row: dict[str, Any] = {"shape": [1, heads, length, size], "dtype": str(dtype), "mask": masked}
                query = torch.randn(1, heads, length, size, device=DEVICE, dtype=dtype)
                mask = torch.zeros(1, 1, length, length, device=DEVICE, dtype=dtype) if masked else None
                with torch.no_grad(), growth(row):
                    made = torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
                row["output_bytes"] = made.numel() * made.element_size()
                found.append(row)
                del query, mask, made
    return found


def link() -> dict[str, Any]:
    """Bytes per second of large copies, the best and the median of ten, after a warm-up."""
    size = LINK_BYTES
    pageable, pinned = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8).pin_memory()
    device = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    copies: dict[str, Callable[[], Any]] = {
        "pinned_to_device": lambda: device.copy_(pinned),
        "pageable_to_device": lambda: device.copy_(pageable),
        "device_to_pinned": lambda: pinned.copy_(device),
        "device_to_pageable": lambda: pageable.copy_(device),
    }
    found = {}
    for name, copy in copies.items():
        rates = []
        for _ in range(12):
            cuda.synchronize()
            start = time.perf_counter()
            copy()
            cuda.synchronize()
            rates.append(size / (time.perf_counter() - start))
        rates = sorted(rates[2:])
        found[name] = {"best": rates[-1], "median": rates[len(rates) // 2]}
    return found


def matrix_rate() -> dict[str, float]:
    """Floating-point operations per second of a large product, by dtype."""
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        left = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device=DEVICE, dtype=dtype)
        for _ in range(3):
            left @ left
        cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            left @ left
        cuda.synchronize()
        found[str(dtype)] = 10 * 2 * PRODUCT_SIDE**3 / (time.perf_counter() - start)
    return found


def context_bytes() -> int:
    """What the driver holds for this process beside the allocator's memory."""
    torch.ones(1, device=DEVICE)
    free, total = cuda.mem_get_info()
    return total - free - cuda.memory_reserved()


PROBES: dict[str, Callable[[], Any]] = {
    "context_bytes": context_bytes,
    "link": link,
    "matrix_rate": matrix_rate,
    "convolutions": convolutions,
    "attention": attention,
}


def machine() -> dict[str, Any]:
    card = cuda.get_device_properties(0)
    return {
        "device": card.name,
        "capability": f"{card.major}.{card.minor}",
        "total_bytes": card.total_memory,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")},
    }


@click.command()
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--minutes", type=float, default=8.0, show_default=True, help="Start no case after so long.")
@click.option("--only", default="", help="Only cases with this in their name.")
@click.option("--list", "listing", is_flag=True, help="Name the cases and stop.")
@click.option("--pretend", "pretended", is_flag=True, help="On the CPU, with tiny pipelines: do all lines run?")
def main(output: Path | None, minutes: float, only: str, *, listing: bool, pretended: bool) -> None:
    if pretended:
        pretend()
    wanted = [case for case in cases() if only in case.name]
    if listing or output is None:
        click.echo("\n".join(case.name for case in wanted))
        return
    begun = time.monotonic()
    found = json.loads(output.read_text()) if output.exists() else {"machine": machine(), "probes": {}, "cases": {}}
    for name, probe in PROBES.items():
        if name not in found["probes"]:
            found["probes"][name] = probe()
            write_text(output, json.dumps(found, indent=1))
    models = Models()
    for case in wanted:
        if case.name in found["cases"]:
            continue
        if time.monotonic() - begun > 60 * minutes:
            click.echo("out of time: start again to go on")
            break
        try:
            found["cases"][case.name] = run_case(case, models)
        except Exception as error:  # one broken case must not cost the others
            if pretended:
                raise
            found["cases"][case.name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        write_text(output, json.dumps(found, indent=1))
        click.echo(f"{time.monotonic() - begun:6.0f} s  {case.name}")
    click.echo(summary(found))


if __name__ == "__main__":
    main()
