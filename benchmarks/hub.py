"""What a plan for a repository reads and takes: bytes, requests, seconds, with empty caches and again.

    python benchmarks/hub.py -o benchmarks/results/hub-DATE.md

The hub is a real HTTP server on the loopback device (tests/support/hub.py) with repositories in their full size: true
configurations and headers, and holes in place of weights. Target, for 12 B parameters and empty caches: under 5 MiB and
under 10 s. Planning is what `vramplan.plan` takes with torch, diffusers and transformers loaded, "command" the whole
of `vramplan plan`, that included. Seconds of CPU stand beside those of the clock, as other programs take their share.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.hub import Hub, save_sparse, serving

# Repository, profile, and in how many files its large components are.
CASES = {
    "black-forest-labs/FLUX.1-dev": ("flux.1-dev", {"transformer": 3, "text_encoder_2": 2}),
    "stabilityai/stable-diffusion-xl-base-1.0": ("stable-diffusion-xl", {}),
}
COLUMNS = ("repository", "caches", "MiB read", "requests", "planning s", "its CPU s", "command s", "its CPU s")
PLANNING = """
import json, sys, time
import diffusers, torch, transformers, vramplan
diffusers.DiffusionPipeline, transformers.PreTrainedModel, vramplan.plan
clock, cpu = time.perf_counter(), time.process_time()
vramplan.plan(sys.argv[1], device="rtx-4070", ram="64GiB")
print(json.dumps([time.perf_counter() - clock, time.process_time() - cpu]))
"""


def timed(command: list[str], environment: dict[str, str]) -> tuple[str, float, float]:
    """What a process prints, its seconds by the clock and of CPU."""
    import resource
    import time

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    clock, cpu = time.perf_counter(), used()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return done.stdout, time.perf_counter() - clock, used() - cpu


def row(hub: Hub, name: str, cache: Path, caches: str) -> tuple[Any, ...]:
    """One plan in a process of its own, alone and as a command, each with caches in this state."""
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache / "hub")}

    def at(folder: str) -> dict[str, str]:
        return environment | {"VRAMPLAN_CACHE": str(cache / folder)}

    hub.sent_bytes = 0
    hub.asked.clear()
    printed, _, _ = timed([sys.executable, "-W", "ignore", "-c", PLANNING, name], at("one"))
    read, requests = hub.sent_bytes, len(hub.asked)
    planning, cpu = json.loads(printed.splitlines()[-1])
    command = [sys.executable, "-m", "vramplan", "plan", name, "--device", "rtx-4070", "--ram", "64GiB", "--json"]
    _, whole, whole_cpu = timed(command, at("two"))
    return name, caches, read / 2**20, requests, planning, cpu, whole, whole_cpu


def table(rows: list[tuple[Any, ...]]) -> str:
    def line(cells: Any) -> str:
        return f"| {' | '.join(f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in cells)} |"

    return "\n".join([line(COLUMNS), "|---|---|" + "--:|" * (len(COLUMNS) - 2), *map(line, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="write the table to this file")
    parser.add_argument("--only", choices=CASES, help="one repository alone")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place, serving(Hub()) as hub:
        for name, (profile, shards) in CASES.items():
            if chosen.only in (None, name):
                folder = Path(place) / profile
                hub.repositories[name] = save_sparse(profile, folder, lambda part, of=shards: of.get(part, 1))
                rows += [row(hub, name, Path(place) / f"{profile} cache", caches) for caches in ("empty", "filled")]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    load = os.getloadavg()[0]
    about = f"{date.today()}, {os.cpu_count()} cores of {platform.machine()} at a load of {load:.1f}, {libraries}"
    text = f"# A plan for a repository\n\n{about}. `python benchmarks/hub.py`\n\n{table(rows)}\n"
    print(text)
    if chosen.output:
        chosen.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
