"""How long `import vramplan` and `vramplan detect` take, as whole processes.

Each is started a number of times, in turn with a bare interpreter so that the machine's own speed is seen
beside them. Targets: 0.1 s for the import beyond the bare interpreter, 0.25 s for `detect`.

    python benchmarks/startup.py [RUNS]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "bare interpreter": [sys.executable, "-c", "pass"],
    "import vramplan": [sys.executable, "-c", "import vramplan"],
    "vramplan detect": [sys.executable, "-m", "vramplan", "detect", "--json"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))
    print(f"{'':18} {'min':>7} {'median':>7} {'max':>7}  seconds, {runs} runs, whole process")
    for name, times in taken.items():
        print(f"{name:18} {min(times):7.3f} {statistics.median(times):7.3f} {max(times):7.3f}")
    bare = statistics.median(taken["bare interpreter"])
    print(f"\nimport vramplan beyond the bare interpreter: {statistics.median(taken['import vramplan']) - bare:.3f} s")


if __name__ == "__main__":
    main()
