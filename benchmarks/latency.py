"""What a simulation costs: seconds, operations and this process's peak memory, each in a process of its own.

    python benchmarks/latency.py

Targets on two cores: FLUX.1-dev 1024 x 1024 under 5 s, CogVideoX-5b with 49 frames and tiling under 20 s, each
under 2 GiB. Seconds are those of the simulation alone; loading torch and diffusers takes some more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

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


def main() -> None:
    print(f"{'':22} {'seconds':>8} {'operations':>11} {'GiB':>6}")
    for model, settings in CASES.items():
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, model, json.dumps(settings)]
        environment = {**os.environ, "VRAMPLAN_CACHE": "0"}
        out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        seconds, operations, peak = json.loads(out.splitlines()[-1])
        print(f"{model:22} {seconds:8.1f} {operations:11} {peak / 2**30:6.2f}")


if __name__ == "__main__":
    main()
