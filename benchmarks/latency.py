"""What a simulation and a plan cost: seconds, operations, this process's peak memory, each in a process of its own.

    python benchmarks/latency.py

Targets on two cores: FLUX.1-dev 1024 x 1024 under 5 s, CogVideoX-5b with 49 frames and tiling under 20 s, each
under 2 GiB; a plan for a pipeline that is loaded under 15 s, under 2 s when it was simulated before. Seconds are those
of the simulation and of the plan alone; loading torch and diffusers takes some more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

CASES = {
    "flux.1-dev": {},
    "cogvideox-5b": {"placement": "model_cpu_offload", "decode": ["vae_slicing", "vae_tiling:tile=240"]},
    "stable-diffusion-xl": {},
    "stable-diffusion-1.5": {},
}
SCRIPT = """
import json, sys
from vramplan.simulating import simulate_model
from vramplan.verify import peak_rss_bytes
found = simulate_model(sys.argv[1], vram="200GiB", settings=json.loads(sys.argv[2]) or {"placement": "resident"})
print(json.dumps([found.wall_seconds, found.operations, peak_rss_bytes()]))
"""

PLANNED = ("flux.1-dev", "stable-diffusion-xl", "cogvideox-5b")
PLANNING = """
import json, sys, time
import vramplan
from vramplan.simulator.pipeline import parts_from_profile
parts = parts_from_profile(sys.argv[1])
pipe = parts.cls(**parts.modules, **parts.others)
took = []
for _ in range(2):
    start = time.perf_counter()
    plan = vramplan.plan(pipe, device="rtx-4090", ram="64GiB")
    took.append(time.perf_counter() - start)
print(json.dumps([*took, len(plan.candidates)]))
"""


def run(script: str, *arguments: str, cache: str) -> list[float]:
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    environment = {**os.environ, "VRAMPLAN_CACHE": cache}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found: list[float] = json.loads(out.splitlines()[-1])
    return found


def main() -> None:
    print(f"{'':22} {'seconds':>8} {'operations':>11} {'GiB':>6}")
    for model, settings in CASES.items():
        seconds, operations, peak = run(SCRIPT, model, json.dumps(settings), cache="0")
        print(f"{model:22} {seconds:8.1f} {operations:11} {peak / 2**30:6.2f}")
    print(f"\n{'':22} {'plan':>8} {'again':>8} {'candidates':>11}")
    for model in PLANNED:
        with tempfile.TemporaryDirectory() as folder:
            first, again, candidates = run(PLANNING, model, cache=folder)
        print(f"{model:22} {first:8.1f} {again:8.1f} {candidates:11}")


if __name__ == "__main__":
    main()
