"""The traces of one call of a model, recorded once each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Protocol

from vramplan.common.cache import Codec, T, key_digest
from vramplan.pipeline.types import PipelineSpec
from vramplan.simulator.placing import expandable_segments, settings_applier
from vramplan.simulator.replay import needs_overlay, replay, replay_refusal
from vramplan.simulator.trace import CallTrace, Overlay, other_events
from vramplan.simulator.types import Simulation
from vramplan.strategies.base import Decodes, Placed, Placement
from vramplan.strategies.resident import Resident
from vramplan.strategies.settings import format_setting, grouped
from vramplan.workload import Workload

if TYPE_CHECKING:
    from vramplan.simulator.memo import Memo
    from vramplan.simulator.parts import Parts


class Recordable(Protocol):
    """A model whose calls are recorded: its parts, its identity, and what is known of it."""

    spec: PipelineSpec
    recorded: dict[str, Any]

    @property
    def parts(self) -> Parts:
        """The weightless or live parts of the model."""

    @property
    def identity(self) -> Any:
        """The facts of the pipeline that affect memory."""

    def memo(self, kernels: Mapping[str, Any]) -> Memo:
        """The recordings of forwards with these kernels."""

    def cached(self, key: Any, make: Callable[[], T], codec: Codec[T]) -> T:
        """The value that is known under a key, or made now."""


class RecordedCall:
    """The traces of one call, each recorded once, or read from the cache."""

    def __init__(
        self,
        model: Recordable,
        workload: Workload,
        executions: Placed,
        decodes: Decodes,
        kernels: Mapping[str, Any],
    ) -> None:
        self.model = model
        self.workload = workload
        self.executions = executions
        self.decodes = decodes
        self.kernels = kernels
        self.key = {
            "trace": model.identity,
            "workload": asdict(workload),
            "executions": [(format_setting(setting), list(names)) for setting, names in executions],
            "decodes": [(format_setting(setting), list(names)) for setting, names in decodes],
            "kernels": {name: value for name, value in kernels.items() if name != "cublas_bytes"},
        }

    def trace(self) -> CallTrace:
        """The trace with everything resident."""
        return self._known(self.key, lambda: self._record({}, ())[1], _TRACES)

    def simulate(self) -> Simulation:
        """Simulate the call with everything resident, and keep the trace."""
        found, trace, _ = self._record({}, ())
        self._known(self.key, lambda: trace, _TRACES)
        return found

    def replay(self, placement: Mapping[str, Placement], capacity_bytes: int | None) -> Simulation | None:
        """Replay the call under a placement; None if it must be simulated."""
        trace = self.trace()
        if replay_refusal(trace, placement) is not None:
            return None
        groups: dict[Placement, list[str]] = {}
        for name, setting in placement.items():
            if needs_overlay(setting):
                groups.setdefault(setting, []).append(name)
        overlays = [self.overlay(setting, part) for setting, names in groups.items() for part in _parts(setting, names)]
        if not all(overlay.names for overlay in overlays):
            return None
        return replay(
            trace,
            placement,
            overlays,
            cublas_bytes=self.kernels["cublas_bytes"],
            capacity_bytes=capacity_bytes,
            expandable=expandable_segments(),
        )

    def overlay(self, setting: Placement, names: Sequence[str]) -> Overlay:
        """What these components do to it under a placement; an overlay of no names if more than their weights change.

        Raises:
            SimulationError: the call does not run under the placement.
        """

        def make() -> Overlay:
            _, trace, overlay = self._record(dict.fromkeys(names, setting), names)
            recorded, plain = (list(other_events(item, names)) for item in (trace, self.trace()))
            return overlay if recorded == plain else replace(overlay, names=())

        return self._known({**self.key, "setting": format_setting(setting), "names": list(names)}, make, _OVERLAYS)

    def _known(self, key: Mapping[str, Any], make: Callable[[], T], codec: Codec[T]) -> T:
        digest = key_digest(key)
        found: T = self.model.recorded.get(digest) or self.model.cached(key, make, codec)
        self.model.recorded[digest] = found
        return found

    def _record(
        self, placement: Mapping[str, Placement], names: Sequence[str]
    ) -> tuple[Simulation, CallTrace, Overlay]:
        from vramplan.simulator.kernels import Kernels
        from vramplan.simulator.run import record_call

        model = self.model
        resident = {component.name: Resident() for component in model.spec.components}
        placed = grouped({**resident, **placement}, {}, {}) if placement else []
        place = settings_applier([*self.executions, *placed], self.decodes)
        kernels, memo = Kernels(**self.kernels), model.memo(self.kernels)
        return record_call(
            model.parts,
            self.workload,
            place,
            expandable=expandable_segments(),
            kernels=kernels,
            memo=memo,
            laid_over=names,
        )


def _parts(setting: Placement, names: Sequence[str]) -> list[list[str]]:
    """The names, in the groups that a setting is applied to in one call."""
    return [list(names)] if setting.whole_pipeline else [[name] for name in names]


# Traces and overlays as the simulator writes them.
_TRACES: Codec[CallTrace] = Codec(write=CallTrace.to_bytes, read=CallTrace.from_bytes)
_OVERLAYS: Codec[Overlay] = Codec(write=Overlay.to_bytes, read=Overlay.from_bytes)
