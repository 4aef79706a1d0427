"""What a simulation and a plan cost: seconds, operations, this process's peak memory, each in a process of its own.

    python benchmarks/latency.py [--only TABLE] [--before CHECKOUT] [-o FILE]

`commands` are whole processes, each with a cache of its own: the first time, and again. With `--before` those of
another checkout run in turn with them.

Targets on two cores: FLUX.1-dev 1024 x 1024 under 5 s, CogVideoX-5b with 49 frames and tiling under 20 s, each
under 2 GiB; a plan for a pipeline that is loaded under 15 s, under 2 s when it was simulated before; the cards of a
model in about a minute, the largest that a card makes in about two. Seconds are those of the simulation, the plan and
the search alone; loading torch and diffusers takes some more. For `fit` those of CPU stand beside those of the clock,
as other programs take their share; nothing is simulated beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

CASES = {
    "flux.1-dev": {},
    "cogvideox-5b": {"placement": "model_cpu_offload", "decode": ["vae_slicing", "vae_tiling:tile=240"]},
    "stable-diffusion-xl": {},
    "stable-diffusion-1.5": {},
}
SCRIPT = """
import json, sys
from vramplan.api.simulate import simulate_model
from vramplan.calibration.peaks import peak_rss_bytes
found = simulate_model(sys.argv[1], vram="200GiB", settings=json.loads(sys.argv[2]) or {"placement": "resident"})
print(json.dumps([found.wall_seconds, found.operations, peak_rss_bytes()]))
"""

COMMAND = "python benchmarks/latency.py"

PLANNED = ("flux.1-dev", "stable-diffusion-xl", "cogvideox-5b")
PLANNING = """
import json, sys, time
import vramplan
from vramplan.simulator.parts import parts_from_profile
parts = parts_from_profile(sys.argv[1])
pipe = parts.cls(**parts.modules, **parts.others)
took = []
for _ in range(2):
    start = time.perf_counter()
    plan = vramplan.plan(pipe, device="rtx-4090", ram="64GiB")
    took.append(time.perf_counter() - start)
print(json.dumps([*took, len(plan.candidates)]))
"""

# What is asked of `fit`: the cards of a model, and the largest of a dimension on a card of 12 GiB.
FITS = [
    *((model, "") for model in PLANNED),
    ("stable-diffusion-xl", "size"),
    ("stable-diffusion-xl", "batch"),
    ("flux.1-dev", "size"),
    ("cogvideox-5b", "frames"),
]
FITTING = """
import json, sys, time
import diffusers, torch, transformers, vramplan
diffusers.DiffusionPipeline, transformers.PreTrainedModel, vramplan.fit
model, largest = sys.argv[1:]
options = {"largest": largest, "device": "rtx-4070"} if largest else {}
clock, cpu = time.perf_counter(), time.process_time()
found = vramplan.fit(model, ram="64GiB", **options)
taken = [time.perf_counter() - clock, time.process_time() - cpu]
answers = found.rows if largest else [item.row for item in found.smallest if item.row]
print(json.dumps([*taken, [[row.device, row.workload.height, row.workload.width, row.workload.num_frames,
    row.workload.num_images_per_prompt] for row in answers]]))
"""


def run(script: str, *arguments: str, cache: str) -> list[Any]:
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    environment = {**os.environ, "VRAMPLAN_CACHE": cache}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found: list[Any] = json.loads(out.splitlines()[-1])
    return found


def simulations() -> Iterator[str]:
    yield f"{'':22} {'seconds':>8} {'operations':>11} {'GiB':>6}"
    for model, settings in CASES.items():
        seconds, operations, peak = run(SCRIPT, model, json.dumps(settings), cache="0")
        yield f"{model:22} {seconds:8.1f} {operations:11} {peak / 2**30:6.2f}"


def plans() -> Iterator[str]:
    yield f"{'':22} {'plan':>8} {'again':>8} {'candidates':>11}"
    for model in PLANNED:
        with tempfile.TemporaryDirectory() as folder:
            first, again, candidates = run(PLANNING, model, cache=folder)
        yield f"{model:22} {first:8.1f} {again:8.1f} {candidates:11}"


def fits() -> Iterator[str]:
    yield f"{'':22} {'largest':>8} {'clock':>8} {'CPU':>8}  answer"
    for model, largest in FITS:
        with tempfile.TemporaryDirectory() as folder:
            clock, cpu, answers = run(FITTING, model, largest, cache=folder)
        texts = (
            f"{width} x {height} x {frames} frames, {batch} a prompt" if largest else str(device)
            for device, height, width, frames, batch in answers
        )
        yield f"{model:22} {largest or 'cards':>8} {clock:8.1f} {cpu:8.1f}  {'; '.join(texts)}"


COMMANDS: list[tuple[str, list[str]]] = [
    ("a wrong device", ["plan", "flux.1-dev", "--device", "rtx-4070x"]),
    ("a wrong model", ["plan", "flux.1-dv", "--device", "rtx-4070"]),
    ("plan flux.1-dev, RTX 4070", ["plan", "flux.1-dev", "--device", "rtx-4070", "--ram", "64GiB"]),
    ("the same for an RTX 4060 Ti", ["plan", "flux.1-dev", "--device", "rtx-4060-ti-16gb", "--ram", "64GiB"]),
    ("plan stable-diffusion-xl, RTX 3060", ["plan", "stable-diffusion-xl", "--device", "rtx-3060", "--ram", "32GiB"]),
    ("plan wan2.2-ti2v-5b, RTX 3070 laptop",
     ["plan", "wan2.2-ti2v-5b", "--device", "rtx-3070-laptop", "--ram", "16GiB"]),
    ("plan flux.1-dev at 768 x 768", ["plan", "flux.1-dev", "--device", "rtx-4070", "--ram", "64GiB", "--height", "768",
                                      "--width", "768"]),
]  # fmt: skip


def commands() -> Iterator[str]:
    yield f"{'':38} {'first':>8} {'again':>8}" + (f" {'before':>8} {'again':>8}" if BEFORE else "")
    for name, arguments in COMMANDS:
        took = []
        for checkout in (Path(__file__).parents[1], *BEFORE):
            with tempfile.TemporaryDirectory() as folder:
                took += [whole_process(arguments, checkout, folder) for _ in range(2)]
        yield f"{name:38} " + " ".join(f"{seconds:8.2f}" for seconds in took)


BEFORE: list[Path] = []  # another checkout, if one was named


def whole_process(arguments: list[str], checkout: Path, cache: str) -> float:
    environment = {**os.environ, "VRAMPLAN_CACHE": cache, "PYTHONPATH": str(checkout)}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "vramplan", *arguments], capture_output=True, env=environment, check=False)
    return time.perf_counter() - start


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "commands": commands,
    "simulation": simulations,
    "plan": plans,
    "fit": fits,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TABLES, help="one table alone")
    parser.add_argument("--before", type=Path, help="another checkout, whose commands are timed too")
    parser.add_argument("-o", "--output", type=Path, help="write the tables to this file too")
    chosen = parser.parse_args()
    BEFORE.extend([chosen.before] if chosen.before else [])
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    load = os.getloadavg()[0]
    lines = [f"{date.today()}, {os.cpu_count()} cores of {platform.machine()} at a load of {load:.1f}, {libraries}"]
    for name in [chosen.only] if chosen.only else TABLES:
        lines.append("")
        for line in TABLES[name]():
            print(line, flush=True)
            lines.append(line)
            if chosen.output:
                text = "\n".join(lines[1:])
                chosen.output.write_text(
                    f"# Latency\n\n{lines[0]}. `{COMMAND}`\n\n```\n{text.strip()}\n```\n", encoding="utf-8"
                )


if __name__ == "__main__":
    main()
