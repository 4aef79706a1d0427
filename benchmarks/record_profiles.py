"""Record what planning finds of the bundled profiles at their usual workload: `profiles/recorded/*.xz`.

    python benchmarks/record_profiles.py [--check] [--jobs N] [NAME ...]

Every profile is planned for cards from 4 to 80 GiB and two sizes of RAM, of an architecture before Hopper and of a
later one. What was described, simulated and recorded meanwhile is what a plan for any other card of these needs. The
library files that the recordings ran through are noted: what is recorded holds for installations that have the same.

`--check` says which files are not of the code as it is; exit code 1 if any.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "profiles" / "recorded"
# One card of each architecture stands for all sizes: only its budget is varied.
DEVICES = ("rtx-4090", "rtx-5090")
VRAM = (4, 6, 8, 10, 12, 16, 20, 24, 32)
RAM = ("16GiB", "64GiB")
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")


@contextmanager
def traced_files() -> Iterator[set[str]]:
    """Context manager: collect the Python files of the libraries in which functions are called."""
    root = f"{sysconfig.get_paths()['purelib']}{os.sep}"
    seen: set[str] = set()
    found: set[str] = set()

    def profile(frame: Any, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if name not in seen:
            seen.add(name)
            path = name.removeprefix(root)
            if path != name and path.partition(os.sep)[0] in LIBRARIES and Path(name).is_file():
                found.add(Path(path).as_posix())

    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(None)


def record(name: str) -> tuple[str, int, float]:
    """Record one profile; return its name, the bytes written, and the seconds taken."""
    os.environ["VRAMPLAN_CACHE"] = "0"
    from vramplan.api.machine import choose_machine
    from vramplan.api.plan import Subject
    from vramplan.api.request import make_request
    from vramplan.common.cache import collecting
    from vramplan.errors import NothingFitsError
    from vramplan.profiles import recorded

    start = time.perf_counter()
    recorded.recorded = lambda name: {}
    sources: set[str] = set()
    with collecting() as entries:
        for device in DEVICES:
            for vram in VRAM:
                for ram in RAM:
                    request = make_request({"device": device, "vram": f"{vram}GiB", "ram": ram})
                    with traced_files() as files:
                        subject = known.setdefault(name, Subject(name, request))
                        try:
                            machine = choose_machine(request.device, vram=request.vram)
                            subject.plan_with_stock(subject.workload(), *machine, request)
                        except NothingFitsError:
                            pass
                    sources |= files
    content = recorded.pack(entries, sources)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.xz").write_bytes(content)
    return name, len(content), time.perf_counter() - start
