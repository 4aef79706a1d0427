"""What a simulation found, as values: no tensor and no torch in them, so that they can be kept in files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vramplan.common.shown import Shown

# Moving weights to the device before the call, then the phases of the call itself.
SimulatedPhaseName = Literal["load", "encode", "denoise", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedPhase:
    """The highest moment of a phase, in bytes, and the module and operation that made it."""

    name: SimulatedPhaseName
    peak_allocated_bytes: int
    weights_bytes: int
    activation_bytes: int
    workspace_bytes: int
    component: str
    module: str
    operation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedUse:
    """A component in a phase: the most bytes it needed beside weights, and what it computed.

    `flops` are floating-point operations of products, convolutions and attention; `traffic_bytes` what all other
    kernels read and wrote; `launches` the kernels; `forwards` how often it was entered. `component` is empty
    for what the pipeline computes between its components.
    """

    phase: str
    component: str
    need_bytes: int
    flops: float
    traffic_bytes: int
    launches: int
    forwards: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedModule:
    """What one module computed in the call, its submodules left out; `name` is empty for the pipeline's own code."""

    name: str
    flops: float
    traffic_bytes: int
    launches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedLatents:
    """What a VAE was given to decode: shape, strides in elements and torch dtype name, and the frames it was told
    these are, if it was."""

    component: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    frames: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The memory after one block was taken or given back: the `tick`th of the call.

    Bytes on the device: weights by component, as `Timeline.components` names them, what is computed, and workspace;
    `reserved_bytes` is what the allocator holds for all of it. `host_bytes` in RAM, of which `pinned_bytes` are
    page-locked.
    """

    tick: int
    phase: SimulatedPhaseName
    component: str
    module: str
    operation: str
    weights_bytes: tuple[int, ...]
    activation_bytes: int
    workspace_bytes: int
    reserved_bytes: int
    host_bytes: int
    pinned_bytes: int

    @property
    def allocated_bytes(self) -> int:
        """All that is allocated on the device."""
        return sum(self.weights_bytes) + self.activation_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The memory over a call of `ticks` blocks taken and given back: some moments of it, every peak among them."""

    components: tuple[str, ...]
    ticks: int
    moments: tuple[Moment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation(Shown):
    """What a call of a pipeline takes on the simulated device.

    `steps` denoising steps were made. `fits` is None without a capacity; `stopped` says where it ran out of
    memory, `short_bytes` by how much at least: 0 where as much was free, in pieces too small; `over_bytes` is by how
    much that request went over the capacity beside all that was reserved. `to_device_bytes` and `to_host_bytes` crossed
    the link. `notes` tells what had to be assumed. `modules` are in the order they first ran.
    `stopped_in` is the phase that it was stopped in.
    `timeline` is there where it was asked for.
    """

    __pydantic_config__ = {"extra": "forbid"}

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    host_peak_bytes: int
    pinned_peak_bytes: int
    phases: tuple[SimulatedPhase, ...]
    uses: tuple[SimulatedUse, ...]
    steps: int
    decoded: tuple[DecodedLatents, ...]
    capacity_bytes: int | None
    fits: bool | None
    stopped: str | None
    short_bytes: int
    over_bytes: int
    to_device_bytes: int
    to_host_bytes: int
    operations: int
    wall_seconds: float
    notes: tuple[str, ...]
    modules: tuple[SimulatedModule, ...] = ()
    timeline: Timeline | None = None
    stopped_in: SimulatedPhaseName | None = None

    def use(self, phase: str, component: str) -> SimulatedUse | None:
        """The use of a component in a phase, None where it did not run there."""
        return next((item for item in self.uses if (item.phase, item.component) == (phase, component)), None)
