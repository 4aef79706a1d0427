"""What every pipeline profile takes at its default workload: the peaks of a simulation with everything resident.

    python benchmarks/profile_peaks.py -o benchmarks/results/profile-peaks.json [NAME ...]

All 41 take some four minutes of CPU, more than each test run can have: the tests simulate some of them anew and hold
the figures against the file, and ask of all others that the file is of the profile as it is. A profile that was changed
is simulated again by name; records of others are kept. Tiling is on where a VAE decodes in no other way.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vramplan.profiles.catalogue import (
    PipelineProfile,
    device_accelerator,
    load_device_profile,
    load_pipeline_profile,
    pipeline_names,
)

RESULTS = Path(__file__).parent / "results" / "profile-peaks.json"
# Whose kernels are simulated; memory is as much as is needed.
DEVICE = "rtx-4090"
# What a memory peak does not depend on.
_WORDS = {"source", "dtype_source", "published", "unconfirmed", "title", "repos"}


def libraries() -> dict[str, str]:
    """The versions that a simulation depends on."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")}


def digest(profile: PipelineProfile) -> str:
    """A short hash of all in a profile that its simulation depends on."""

    def facts(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: facts(item) for key, item in value.items() if key not in _WORDS}
        return value

    return hashlib.sha256(json.dumps(facts(asdict(profile)), sort_keys=True).encode()).hexdigest()[:16]


def simulated(name: str) -> dict[str, Any]:
    """The profile's record. Raises SimulationError where its call cannot be simulated."""
    from vramplan.pipeline.describe import describe
    from vramplan.simulator.model import SimulatedModel, simulated_footprint
    from vramplan.workload import make_workload

    start = time.process_time()
    described = describe(name)
    work = make_workload(described.defaults, {})
    accelerator = device_accelerator(load_device_profile(DEVICE))
    found = simulated_footprint(SimulatedModel(described.spec), work, accelerator).plain
    return {
        "digest": digest(load_pipeline_profile(name)),
        "workload": asdict(work),
        "peak_allocated_bytes": found.peak_allocated_bytes,
        "peak_reserved_bytes": found.peak_reserved_bytes,
        "phases": {phase.name: phase.peak_allocated_bytes for phase in found.phases},
        "components": sorted({use.component for use in found.uses if use.component}),
        "operations": found.operations,
        "notes": list(found.notes),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *pipeline_names()], metavar="NAME", help="these alone")
    parser.add_argument("-o", "--output", type=Path, help="write to this file, and keep what it has of others")
    chosen = parser.parse_args()
    kept = json.loads(chosen.output.read_text())["profiles"] if chosen.output and chosen.output.exists() else {}
    for name in chosen.names or pipeline_names():
        kept[name] = simulated(name)
        peak = kept[name]["peak_reserved_bytes"] / 2**30
        print(f"{name:26} {peak:7.2f} GiB reserved {kept[name]['cpu_seconds']:6.1f} s of CPU", flush=True)
        if chosen.output:
            about = {"date": f"{date.today()}", "device": DEVICE, "libraries": libraries()}
            ordered = {name: kept[name] for name in sorted(kept) if name in pipeline_names()}
            chosen.output.write_text(json.dumps({**about, "profiles": ordered}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
