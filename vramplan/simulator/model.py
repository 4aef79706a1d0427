"""Simulate a model under a plan, or what the planner needs to know of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, Any

from vramplan.hardware.types import Accelerator
from vramplan.pipeline.sources import Folder, Hub, Live, Profile, Source
from vramplan.pipeline.types import PipelineSpec
from vramplan.planner.footprint import ASSUMED_SLACK
from vramplan.simulator.cache import cached
from vramplan.simulator.footprint import SimulatedFootprint
from vramplan.simulator.types import DecodedLatents, Simulation
from vramplan.strategies.base import AtLoad, Decode, Decodes, Execution, Placed, apply_settings, freed_first
from vramplan.strategies.settings import format_setting
from vramplan.units import MIB
from vramplan.workload import Workload

if TYPE_CHECKING:
    from vramplan.simulator.memo import Memo
    from vramplan.simulator.parts import Parts

# The simulated device is always this one: what it stands for is a matter of capacity and kernels.
DEVICE = "cuda:0"


def simulated_footprint(
    model: SimulatedModel, workload: Workload, accelerator: Accelerator, unplaced: Placed = ()
) -> SimulatedFootprint:
    """The planner's figures for a model with these settings, none of which is a placement.

    Raises:
        SimulationError: the pipeline cannot be driven.
    """
    spec = model.spec
    vaes = [component.name for component in spec.vaes]
    must_tile = [vae for vae in spec.vaes if vae.tiling is not None and vae.tiling.required]

    tiled = [(setting, vaes) for setting in _tilings(must_tile)]
    plain = model.run(workload, unplaced, tiled, accelerator=accelerator)

    return SimulatedFootprint(spec=spec, workload=workload, plain=plain, decode=_decodes(model, plain, accelerator))


def traced_footprint(model: SimulatedModel, workload: Workload, accelerator: Accelerator) -> SimulatedFootprint:
    """The planner's figures from components traced one by one, where the whole call cannot be driven."""
    plain = model.alone(workload, accelerator=accelerator)

    return SimulatedFootprint(
        spec=model.spec,
        workload=workload,
        plain=plain,
        decode=_decodes(model, plain, accelerator),
        basis="derived",
        slack=ASSUMED_SLACK,
    )


def _decodes(
    model: SimulatedModel, plain: Simulation, accelerator: Accelerator
) -> Callable[[tuple[Decode, ...]], Simulation | None]:
    """What decodes the latents of a call with other settings, each simulated once."""
    from vramplan.simulator.run import SimulationError

    vaes = [component.name for component in model.spec.vaes]

    @cache
    def decode(settings: tuple[Decode, ...]) -> Simulation | None:
        try:
            return model.decode(plain.decoded, [(setting, vaes) for setting in settings], accelerator=accelerator)
        except SimulationError:
            return None

    return decode


def _tilings(vaes: Sequence[Any]) -> tuple[Decode, ...]:
    from vramplan.strategies.vae_tiling import VaeTiling

    return (VaeTiling(),) if vaes else ()


class SimulatedModel:
    """A model that can be simulated any number of times. Its parts are put together once, when first needed."""

    def __init__(self, spec: PipelineSpec) -> None:
        self.spec = spec
        self._parts: Parts | None = None
        self._memos: dict[tuple[Any, ...], Memo] = {}

    @property
    def parts(self) -> Parts:
        """The weightless or live parts of the model."""
        if self._parts is None:
            self._parts = _parts(self.spec)
        return self._parts

    def run(
        self,
        workload: Workload,
        placed: Placed,
        decodes: Decodes,
        *,
        accelerator: Accelerator | None,
        capacity_bytes: int | None = None,
        timeline: bool = False,
    ) -> Simulation:
        """One simulation, from the cache where it was made before. Nothing placed means everything resident.

        With `timeline` the memory over the call is in it too.
        """
        from vramplan.simulator.kernels import Kernels
        from vramplan.simulator.run import First, run_simulation

        kernels = self.kernels(accelerator)
        placed = [
            (setting, names) for setting, names in placed if not isinstance(setting, Execution) or setting.simulated
        ]
        first, rest = freed_first(placed)
        key = {
            "pipeline": _identity(self.spec),
            "workload": asdict(workload),
            "placed": [(format_setting(setting), list(names), _stamp(setting)) for setting, names in placed],
            "decodes": [(format_setting(setting), list(names)) for setting, names in decodes],
            "capacity": capacity_bytes,
            "expandable": expandable_segments(),
            "kernels": kernels,
        }
        if timeline:
            key["timeline"] = True

        def make() -> Simulation:
            return run_simulation(
                self.parts,
                workload,
                placing(rest, decodes),
                first=First(names=[n for _, names in first for n in names], place=placing(first, ()))
                if first
                else None,
                capacity_bytes=capacity_bytes,
                expandable=expandable_segments(),
                kernels=Kernels(**kernels),
                memo=self._memo(kernels),
                timeline=timeline,
            )

        return cached(key, make)

    def kernels(self, accelerator: Accelerator | None) -> dict[str, Any]:
        """What is known of a card's kernels, as `Kernels` names it, as far as it makes a difference to this model: how
        a dtype is computed in that none of its components has does not. Where weights are in another dtype than what
        is computed there is no telling."""
        found = kernels_of(accelerator)
        parts = self.spec.components
        if any(part.quantized or part.hooks for part in parts):
            return found
        held = {dtype for part in parts for dtype in part.dtype_bytes}
        return found | {"math_dtypes": tuple(dtype for dtype in found["math_dtypes"] if dtype in held)}

    def _memo(self, kernels: Mapping[str, Any]) -> Memo:
        """What simulations with these kernels have recorded, whatever cuBLAS holds: that is taken anew in each."""
        from vramplan.simulator.memo import Memo

        key = tuple(value for name, value in kernels.items() if name != "cublas_bytes")
        return self._memos.setdefault(key, Memo())

    def alone(self, workload: Workload, *, accelerator: Accelerator | None) -> Simulation:
        """One forward of each component by itself, from the cache where that was made before."""
        from vramplan.simulator.component_trace import trace_components
        from vramplan.simulator.kernels import Kernels

        kernels = self.kernels(accelerator)
        key = {"alone": _identity(self.spec), "workload": asdict(workload), "kernels": kernels}
        return cached(key, lambda: trace_components(self.parts, self.spec, workload, Kernels(**kernels)))

    def decode(
        self, latents: Sequence[DecodedLatents], decodes: Decodes, *, accelerator: Accelerator | None
    ) -> Simulation:
        """Only the decode of a call, with these settings; from the cache where it was made before."""
        from vramplan.simulator.kernels import Kernels
        from vramplan.simulator.run import run_decode

        kernels = self.kernels(accelerator)
        names = {item.component for item in latents}
        here = [(setting, [name for name in given if name in names]) for setting, given in decodes]
        key = {
            "pipeline": _identity(self.spec),
            "latents": [asdict(item) for item in latents],
            "decodes": [(format_setting(setting), given) for setting, given in here],
            "kernels": kernels,
        }

        def make() -> Simulation:
            return run_decode(
                self.parts, latents, placing([], here), kernels=Kernels(**kernels), memo=self._memo(kernels)
            )

        return cached(key, make)


def _parts(spec: PipelineSpec) -> Parts:
    from vramplan.pipeline.hub import open_repository
    from vramplan.simulator.parts import parts_from_live, parts_from_profile, parts_from_repository

    source = spec.source
    if isinstance(source, Live):
        return parts_from_live(source.pipe)
    dtypes = {component.name: component.dtype for component in spec.components}
    if isinstance(source, Profile):
        return parts_from_profile(source.name, dtypes)
    assert isinstance(source, Folder | Hub), f"{source} is described as a profile"
    return parts_from_repository(open_repository(source), dtypes)


def placing(placed: Placed, decodes: Decodes) -> Callable[[Any], None]:
    """A function that puts the settings on a hollow pipeline through their own diffusers calls."""

    def place(pipe: Any) -> None:
        apply_settings(pipe, placed, decodes, DEVICE, hollow=True)
        if not any(setting.axis == "placement" for setting, _ in placed):
            pipe.to(DEVICE)

    return place


def expandable_segments() -> bool:
    """Whether the environment tells torch's allocator so, for the process that will run the plan too.

    Both names are read: PYTORCH_ALLOC_CONF since torch 2.10, PYTORCH_CUDA_ALLOC_CONF before.
    """
    told = ",".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return "expandable_segments:true" in told.replace(" ", "").lower()


def _stamp(setting: Any) -> tuple[int, int] | None:
    """What tells a file of weights from one that stood in its place before."""
    if not isinstance(setting, AtLoad) or setting.source is None:
        return None
    about = setting.source.stat()
    return about.st_size, about.st_mtime_ns


def _identity(spec: PipelineSpec) -> Any:
    """All of a pipeline that its memory and the evaluations of its denoiser depend on."""
    return [
        spec.class_name,
        _scheduler(spec.source),
        [
            [c.name, c.class_name, dict(c.config), dict(c.dtype_bytes), c.parameter_count, c.quantized]
            for c in sorted(spec.components, key=lambda component: component.name)
        ],
    ]


def _scheduler(source: Source) -> Any:
    """What tells the pipeline's scheduler from others: its configuration, or the name it is published under."""
    if isinstance(source, Folder):
        path = source.path / "scheduler" / "scheduler_config.json"
        return path.read_text(encoding="utf-8") if path.is_file() else None
    if not isinstance(source, Live):
        return str(source)
    scheduler = getattr(source.pipe, "scheduler", None)
    config = dict(getattr(scheduler, "config", {}))
    return type(scheduler).__name__, {name: value for name, value in config.items() if not name.startswith("_")}


def kernels_of(accelerator: Accelerator | None) -> dict[str, Any]:
    """What is known of a card's kernels, as `Kernels` names it: cuBLAS holds 32 MiB on Hopper and later, 8 before."""
    from vramplan.profiles.catalogue import compute_capability, math_dtypes

    capability = compute_capability(accelerator.name) if accelerator else None
    return {
        "cublas_bytes": (32 if capability is not None and capability >= 9.0 else 8) * MIB,
        "math_dtypes": math_dtypes(accelerator) if accelerator else (),
        "fused_attention": accelerator.fuses_attention if accelerator else True,
    }
