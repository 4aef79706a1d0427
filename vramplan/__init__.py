"""vramplan: plan, apply and check the memory settings of a diffusers pipeline.

Everything is imported on first use: importing vramplan imports neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vramplan._version import __version__

if TYPE_CHECKING:
    from vramplan.api.apply import apply_plan, auto_configure
    from vramplan.api.change import changing
    from vramplan.api.fit import fit
    from vramplan.api.plan import plan
    from vramplan.api.recover import recovering_call
    from vramplan.api.simulate import simulate
    from vramplan.errors import MismatchError, NothingFitsError, UsageError, VramplanError
    from vramplan.fitting.types import Fits
    from vramplan.hardware.detect import detect
    from vramplan.hardware.types import Hardware
    from vramplan.planfile.file import dump_plan, load_plan
    from vramplan.planfile.types import Plan
    from vramplan.runtime.applied import Applied, applied_to
    from vramplan.runtime.recording import calibrating
    from vramplan.simulator.types import Simulation
    from vramplan.streaming.attach import stream_weights
    from vramplan.workload import Workload

_HOMES = {
    "Applied": "vramplan.runtime.applied",
    "applied_to": "vramplan.runtime.applied",
    "apply_plan": "vramplan.api.apply",
    "auto_configure": "vramplan.api.apply",
    "calibrating": "vramplan.runtime.recording",
    "changing": "vramplan.api.change",
    "MismatchError": "vramplan.errors",
    "NothingFitsError": "vramplan.errors",
    "UsageError": "vramplan.errors",
    "VramplanError": "vramplan.errors",
    "Fits": "vramplan.fitting.types",
    "fit": "vramplan.api.fit",
    "Hardware": "vramplan.hardware.types",
    "detect": "vramplan.hardware.detect",
    "Plan": "vramplan.planfile.types",
    "dump_plan": "vramplan.planfile.file",
    "load_plan": "vramplan.planfile.file",
    "plan": "vramplan.api.plan",
    "recovering_call": "vramplan.api.recover",
    "simulate": "vramplan.api.simulate",
    "Simulation": "vramplan.simulator.types",
    "stream_weights": "vramplan.streaming.attach",
    "Workload": "vramplan.workload",
}

__all__ = [
    "Applied",
    "Fits",
    "Hardware",
    "MismatchError",
    "NothingFitsError",
    "Plan",
    "Simulation",
    "UsageError",
    "VramplanError",
    "Workload",
    "__version__",
    "applied_to",
    "apply_plan",
    "auto_configure",
    "calibrating",
    "changing",
    "detect",
    "dump_plan",
    "fit",
    "load_plan",
    "plan",
    "recovering_call",
    "simulate",
    "stream_weights",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'vramplan' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
