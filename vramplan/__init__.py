"""vramplan: plan, apply and check the memory settings of a diffusers pipeline.

Everything is imported on first use: importing vramplan imports neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vramplan._version import __version__

if TYPE_CHECKING:
    from vramplan.again import changing
    from vramplan.apply import Applied, applied_to, apply_plan, auto_configure
    from vramplan.calibration.recording import calibrating
    from vramplan.errors import MismatchError, NothingFitsError, UsageError, VramplanError
    from vramplan.fitting import Fits, fit
    from vramplan.hardware import Hardware, detect
    from vramplan.planfile import Plan, dump_plan, load_plan
    from vramplan.planning import plan
    from vramplan.recover import recovering_call
    from vramplan.simulating import simulate
    from vramplan.simulator.types import Simulation
    from vramplan.workload import Workload

_HOMES = {
    "Applied": "vramplan.apply",
    "applied_to": "vramplan.apply",
    "apply_plan": "vramplan.apply",
    "auto_configure": "vramplan.apply",
    "calibrating": "vramplan.calibration.recording",
    "changing": "vramplan.again",
    "MismatchError": "vramplan.errors",
    "NothingFitsError": "vramplan.errors",
    "UsageError": "vramplan.errors",
    "VramplanError": "vramplan.errors",
    "Fits": "vramplan.fitting",
    "fit": "vramplan.fitting",
    "Hardware": "vramplan.hardware",
    "detect": "vramplan.hardware",
    "Plan": "vramplan.planfile",
    "dump_plan": "vramplan.planfile",
    "load_plan": "vramplan.planfile",
    "plan": "vramplan.planning",
    "recovering_call": "vramplan.recover",
    "simulate": "vramplan.simulating",
    "Simulation": "vramplan.simulator.types",
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
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'vramplan' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
