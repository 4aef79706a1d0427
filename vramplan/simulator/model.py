"""Simulate a model under a plan, or for the costs of the planner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from vramplan.common.cache import NOTHING, Codec, T, cached, json_codec, lookup, store
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.sources import Folder, Hub, Live, Profile, Source
from vramplan.pipeline.types import PipelineSpec
from vramplan.planner.footprint import ASSUMED_SLACK
from vramplan.profiles.recorded import recorded
from vramplan.simulator.footprint import SimulatedFootprint
from vramplan.simulator.placing import expandable_segments, settings_applier
from vramplan.simulator.recorded_call import RecordedCall
from vramplan.simulator.types import DecodedLatents, Simulation
from vramplan.strategies.base import AtLoad, Decode, Decodes, Execution, Placed, Placement, freed_first
from vramplan.strategies.settings import format_setting, grouped
from vramplan.strategies.vae_tiling import VaeTiling
from vramplan.units import MIB
from vramplan.workload import Workload

if TYPE_CHECKING:
    from vramplan.simulator.memo import Memo
    from vramplan.simulator.parts import Parts


def simulated_footprint(
    model: SimulatedModel, workload: Workload, accelerator: Accelerator, unplaced: Placed = ()
) -> SimulatedFootprint:
    """Simulate the costs of a model under these settings, none of which is a placement.

    Raises:
        SimulationError: the pipeline cannot be called.
    """
    spec = model.spec
    must_tile = any(vae.tiling is not None and vae.tiling.required for vae in spec.vaes)
    tiled = [(VaeTiling(), [vae.name for vae in spec.vaes])] if must_tile else []
    plain = model.run(workload, unplaced, tiled, accelerator=accelerator)
    return SimulatedFootprint(spec=spec, workload=workload, plain=plain, decode=_decodes(model, plain, accelerator))


def traced_footprint(model: SimulatedModel, workload: Workload, accelerator: Accelerator) -> SimulatedFootprint:
    """Derive the costs from components traced one by one, for a call that cannot be simulated."""
    plain = model.trace(workload, accelerator=accelerator)
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
    """Return a function that simulates the decode with other settings, each once."""
    from vramplan.simulator.types import SimulationError

    vaes = [component.name for component in model.spec.vaes]

    @cache
    def decode(settings: tuple[Decode, ...]) -> Simulation | None:
        try:
            return model.decode(plain.decoded, [(setting, vaes) for setting in settings], accelerator=accelerator)
        except SimulationError:
            return None

    return decode


class SimulatedModel:
    """A model to simulate repeatedly; the parts are built once, when first needed."""

    def __init__(self, spec: PipelineSpec) -> None:
        self.spec = spec
        self._shipped = recorded(spec.source.name) if isinstance(spec.source, Profile) else NOTHING
        self._parts: Parts | None = None
        self._memos: dict[tuple[Any, ...], Memo] = {}
        self.recorded: dict[str, Any] = {}  # traces and overlays, by the digest of their key

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
        """Simulate a call, or read it from the cache. Without placements everything is resident.

        `timeline` adds the memory over the call.
        """
        kernels = self.kernels(accelerator)
        placed = [
            (setting, names) for setting, names in placed if not isinstance(setting, Execution) or setting.simulated
        ]
        first, rest = freed_first(placed)
        key = {
            "pipeline": self.identity,
            "workload": asdict(workload),
            "placed": [(format_setting(setting), list(names), _file_stamp(setting)) for setting, names in placed],
            "decodes": [(format_setting(setting), list(names)) for setting, names in decodes],
            "expandable": expandable_segments(),
            "kernels": kernels,
        }
        if timeline:
            key["timeline"] = True

        def make() -> Simulation:
            from vramplan.simulator.kernels import Kernels
            from vramplan.simulator.run import First, run_simulation

            plain = all(isinstance(setting, Execution) for setting, _ in placed) and self._recordable
            if plain and capacity_bytes is None and not timeline:
                found = RecordedCall(self, workload, placed, decodes, kernels).simulate()
                return replace(found, notes=(*found.notes, *self._unknown(kernels)))
            encoding = First(names=[name for _, names in first for name in names], place=settings_applier(first, ()))
            found = run_simulation(
                self.parts,
                workload,
                settings_applier(rest, decodes),
                first=encoding if first else None,
                capacity_bytes=capacity_bytes,
                expandable=expandable_segments(),
                kernels=Kernels(**kernels),
                memo=self.memo(kernels),
                timeline=timeline,
            )
            return replace(found, notes=(*found.notes, *self._unknown(kernels)))

        return self._within(capacity_bytes, key, make)

    @property
    def identity(self) -> Any:
        """The facts of the pipeline that affect memory and the evaluations of its denoiser."""
        spec = self.spec
        return [
            spec.class_name,
            _scheduler(spec.source),
            [
                [c.name, c.class_name, dict(c.config), dict(c.dtype_bytes), c.parameter_count, c.quantized]
                for c in sorted(spec.components, key=lambda component: component.name)
            ],
        ]

    @property
    def _recordable(self) -> bool:
        """Whether traces tell all: weights are plain tensors that nothing else moves."""
        return not any(component.quantized or component.hooks for component in self.spec.components)

    def cached(self, key: Any, make: Callable[[], T], codec: Codec[T]) -> T:
        """The value that came with the pipeline's profile, or was cached, or is made now."""
        return cached(key, make, codec, module=__name__, shipped=self._shipped)

    def _within(self, capacity_bytes: int | None, key: Mapping[str, Any], make: Callable[[], Simulation]) -> Simulation:
        """The simulation within a capacity, known or made now.

        One that never met its capacity is that of any capacity from its peak on: it is cached once for all of these.
        """
        known = lookup(key, _SIMULATIONS, module=__name__, shipped=self._shipped)
        if known is not None and (capacity_bytes is None or known.peak_reserved_bytes <= capacity_bytes):
            return replace(known, capacity_bytes=capacity_bytes, fits=None if capacity_bytes is None else True)
        if capacity_bytes is None:
            return self.cached(key, make, _SIMULATIONS)
        found = self.cached({**key, "capacity": capacity_bytes}, make, _SIMULATIONS)
        if not found.limited:
            store(key, replace(found, capacity_bytes=None, fits=None), _SIMULATIONS, module=__name__)
        return found

    def _unknown(self, kernels: Mapping[str, Any]) -> Iterable[str]:
        """Notes on what is not known of these kernels, as far as the model needs it."""
        convolving = [part for part in self.spec.components if part.role in ("denoiser", "vae")]
        wide = [part for part in convolving if part.dtype == "float32" or part.config.get("force_upcast")]
        if not kernels["tf32"] and wide:
            names = " and ".join(part.name for part in wide)
            yield f"{names} in float32: workspaces of convolutions before Ampere are not known, and not counted"

    def kernels(self, accelerator: Accelerator | None) -> dict[str, Any]:
        """Return the options of `Kernels` for a card that matter to this model: dtypes that no component has are left
        out, unless weights are stored in another dtype than they are computed in."""
        found = kernels_of(accelerator)
        parts = self.spec.components
        if any(part.quantized or part.hooks for part in parts):
            return found
        held = {dtype for part in parts for dtype in part.dtype_bytes}
        return found | {"math_dtypes": tuple(dtype for dtype in found["math_dtypes"] if dtype in held)}

    def memo(self, kernels: Mapping[str, Any]) -> Memo:
        """Return the records of simulations with these kernels; the workspace of cuBLAS is allocated in each."""
        from vramplan.simulator.memo import Memo

        key = tuple(value for name, value in kernels.items() if name != "cublas_bytes")
        return self._memos.setdefault(key, Memo())

    def trace(self, workload: Workload, *, accelerator: Accelerator | None) -> Simulation:
        """Trace one forward of each component separately, or read it from the cache."""
        kernels = self.kernels(accelerator)
        key = {"alone": self.identity, "workload": asdict(workload), "kernels": kernels}

        def make() -> Simulation:
            from vramplan.simulator.component_trace import trace_components
            from vramplan.simulator.kernels import Kernels

            return trace_components(self.parts, self.spec, workload, Kernels(**kernels))

        return self.cached(key, make, _SIMULATIONS)

    def decode(
        self, latents: Sequence[DecodedLatents], decodes: Decodes, *, accelerator: Accelerator | None
    ) -> Simulation:
        """Simulate only the decode of a call under these settings, or read it from the cache."""
        kernels = self.kernels(accelerator)
        names = {item.component for item in latents}
        here = [(setting, [name for name in given if name in names]) for setting, given in decodes]
        key = {
            "pipeline": self.identity,
            "latents": [asdict(item) for item in latents],
            "decodes": [(format_setting(setting), given) for setting, given in here],
            "kernels": kernels,
        }

        def make() -> Simulation:
            from vramplan.simulator.kernels import Kernels
            from vramplan.simulator.run import run_decode

            return run_decode(
                self.parts, latents, settings_applier([], here), kernels=Kernels(**kernels), memo=self.memo(kernels)
            )

        return self.cached(key, make, _SIMULATIONS)

    def replayed(
        self,
        workload: Workload,
        placement: Mapping[str, Placement],
        execution: Mapping[str, Sequence[Execution]],
        decodes: Decodes,
        *,
        accelerator: Accelerator | None,
        capacity_bytes: int | None,
    ) -> Simulation | None:
        """The simulation of a call under this placement, by replaying its recorded trace; None if it must be run.

        Work and transfers are not part of it.
        """
        if not self._recordable:
            return None
        executions = [
            item for item in grouped({}, {}, execution) if isinstance(item[0], Execution) and item[0].simulated
        ]
        return RecordedCall(self, workload, executions, decodes, self.kernels(accelerator)).replay(
            placement, capacity_bytes
        )


_SIMULATIONS: Codec[Simulation] = json_codec(Simulation)


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


def _file_stamp(setting: Any) -> tuple[int, int] | None:
    """Return size and modification time of a setting's file, to detect another file with the same name."""
    if not isinstance(setting, AtLoad) or setting.source is None:
        return None
    stat = setting.source.stat()
    return stat.st_size, stat.st_mtime_ns


def _scheduler(source: Source) -> Any:
    """The identity of the pipeline's scheduler: its configuration, or the name it is published under."""
    if isinstance(source, Folder):
        path = source.path / "scheduler" / "scheduler_config.json"
        return path.read_text(encoding="utf-8") if path.is_file() else None
    if not isinstance(source, Live):
        return str(source)
    scheduler = getattr(source.pipe, "scheduler", None)
    config = dict(getattr(scheduler, "config", {}))
    return type(scheduler).__name__, {name: value for name, value in config.items() if not name.startswith("_")}


def kernels_of(accelerator: Accelerator | None) -> dict[str, Any]:
    """Return the options of `Kernels` for a card: cuBLAS holds 32 MiB on Hopper and later, 8 MiB before.

    An unknown card is taken to have TF32.
    """
    from vramplan.profiles.catalogue import compute_capability, math_dtypes

    capability = compute_capability(accelerator.name) if accelerator else None
    return {
        "cublas_bytes": (32 if capability is not None and capability >= 9.0 else 8) * MIB,
        "tf32": capability is None or capability >= 8.0,
        "math_dtypes": math_dtypes(accelerator) if accelerator else (),
        "fused_attention": accelerator.fuses_attention if accelerator else True,
    }
