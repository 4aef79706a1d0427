"""Record what planning finds of the bundled profiles at their usual workload: `profiles/recorded/*.xz`.

    python benchmarks/record_profiles.py [--check] [--jobs N] [NAME ...]

Every profile is planned for cards from 4 to 24 GiB and three sizes of RAM, of an architecture before Hopper and of a
later one, as far as a minute of computing goes. What was described, simulated and recorded meanwhile is what a plan for
any other card of these needs. The library files that this ran through are noted: what is recorded holds for
installations that have the same.

`--check` says which files are not of the code as it is; exit code 1 if any.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from vramplan.common.cache import collecting
from vramplan.errors import NothingFitsError, VramplanError
from vramplan.profiles import recorded
from vramplan.profiles.files import profile_files

FOLDER = Path(__file__).parents[1] / "profiles" / recorded.FOLDER
# Budgets of one card of each architecture, which stands for all of its kind: those that most people have come first.
CASES = [("rtx-4090", vram, ram) for ram in ("64GiB", "32GiB", "16GiB") for vram in (8, 12, 16, 24)]
CASES[4:4] = [("rtx-5090", 24, "64GiB"), ("rtx-5090", 8, "64GiB")]
CASES += [("rtx-4090", vram, ram) for ram in ("32GiB", "16GiB", "64GiB") for vram in (6, 10, 20, 4)]
# A profile is left after the case in which so many seconds of computing are over: what it has by then is as valid.
LIMIT_S = 60
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")
# What placements run through, whichever of them a plan tries.
ALWAYS = ("accelerate/hooks.py", "accelerate/big_modeling.py", "diffusers/hooks/group_offloading.py")


@contextmanager
def called_files(found: set[str]) -> Iterator[None]:
    """Context manager: add the Python files of the libraries in which functions are called."""
    root = f"{sysconfig.get_paths()['purelib']}{os.sep}"
    seen: set[str] = set()

    def profile(frame: Any, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if name not in seen and frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # a function, not a module or class
            seen.add(name)
            path = name.removeprefix(root)
            if path != name and path.partition(os.sep)[0] in LIBRARIES and Path(name).is_file():
                found.add(Path(path).as_posix())

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def record(name: str) -> tuple[str, int, int, float]:
    """Record one profile; return its name, the number of values, the bytes written, and the seconds taken."""
    start = time.perf_counter()
    sources = set(ALWAYS)
    with tempfile.TemporaryDirectory() as folder, collecting() as entries:
        os.environ |= {"VRAMPLAN_CACHE": folder, "VRAMPLAN_RECORDED": "0"}
        import_all(name)
        for number, case in enumerate(CASES):
            if time.process_time() > LIMIT_S:
                break
            with called_files(sources) if number == 0 else nullcontext(), suppress(NothingFitsError):
                _plan(name, *case)
    kept = {digest: content for digest, (key, content) in entries.items() if "capacity" not in key}
    content = recorded.pack(kept, sources)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}{recorded.SUFFIX}").write_bytes(content)
    return name, len(kept), len(content), time.perf_counter() - start


def import_all(name: str) -> None:
    """Import what a profile's pipeline needs, whose decorators and the like are not part of any call."""
    from vramplan.pipeline.build import component_class
    from vramplan.pipeline.bundled import profile_class
    from vramplan.profiles.catalogue import load_pipeline_profile

    profile = load_pipeline_profile(name)
    profile_class(profile)
    for part in profile.components.values():
        component_class(part.library, part.class_name)


def _plan(name: str, device: str, vram: int, ram: str) -> None:
    from vramplan.api.plan import plan

    plan(name, device=device, vram=f"{vram}GiB", ram=ram)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args()
    names = given.names or sorted(profile_files("pipelines"))
    if given.check:
        stale = [name for name in names if not recorded.is_current(name)]
        print(f"not of this code: {', '.join(stale)}" if stale else f"{len(names)} files are of this code")
        return bool(stale)
    with ProcessPoolExecutor(given.jobs, max_tasks_per_child=1) as pool:
        for number, future in enumerate([pool.submit(record, name) for name in names], 1):
            try:
                name, values, size, seconds = future.result()
            except VramplanError as error:
                print(f"{number}/{len(names)} {error}", flush=True)
                continue
            print(f"{number}/{len(names)} {name}: {values} values, {size / 1024:.0f} KiB, {seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
