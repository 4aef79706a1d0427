"""How long `import vramplan` and `vramplan detect` take, as whole processes.

Each is started a number of times, in turn with a bare interpreter so that the machine's own speed is seen
beside them. `detect` runs on this machine and on one with a card, which a module in pynvml's place answers for: the
driver's own time is not in that. Targets: 0.1 s for the import beyond the bare interpreter, 0.25 s for `detect`.

    python benchmarks/startup.py [RUNS]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAND_IN = """
class NVMLError(Exception): pass
class NVMLError_LibraryNotFound(NVMLError): pass
class NVMLError_NotSupported(NVMLError): pass
class Memory: total, free = 12 << 30, 11 << 30
nvmlInit = nvmlShutdown = lambda: None
nvmlDeviceGetCount = lambda: 1
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetName = lambda handle: "NVIDIA GeForce RTX 4070"
nvmlDeviceGetUUID = lambda handle: "GPU-1b2f6a50-8c1d-4e7a-9f30-5d2c8e7b1a01"
nvmlDeviceGetMemoryInfo = lambda handle: Memory
nvmlDeviceGetCudaComputeCapability = lambda handle: (8, 9)
"""
DETECT = [sys.executable, "-m", "vramplan", "detect", "--json"]
COMMANDS = {
    "bare interpreter": [sys.executable, "-c", "pass"],
    "import vramplan": [sys.executable, "-c", "import vramplan"],
    "vramplan detect": DETECT,
    "  with a card": DETECT,
}


def seconds(command: list[str], environment: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pynvml.py").write_text(STAND_IN)
        path = os.pathsep.join((folder, os.environ.get("PYTHONPATH", "")))
        for _ in range(runs):
            for name, command in COMMANDS.items():
                card = {"PYTHONPATH": path} if "card" in name else {}
                taken[name].append(seconds(command, {**os.environ, **card}))
    print(f"{'':18} {'min':>7} {'median':>7} {'max':>7}  seconds, {runs} runs, whole process")
    for name, times in taken.items():
        print(f"{name:18} {min(times):7.3f} {statistics.median(times):7.3f} {max(times):7.3f}")
    bare = statistics.median(taken["bare interpreter"])
    print(f"\nimport vramplan beyond the bare interpreter: {statistics.median(taken['import vramplan']) - bare:.3f} s")


if __name__ == "__main__":
    main()
