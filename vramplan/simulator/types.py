"""The results of a simulation as plain values, without tensors, so that they can be stored in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vramplan.common.shown import Shown
from vramplan.errors import VramplanError

# Moving weights to the device before the call, then the phases of the call itself.
SimulatedPhaseName = Literal["load", "encode", "denoise", "decode"]


class SimulationError(VramplanError):
    """The pipeline could not be simulated. The message names the operation that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedPhase:
    """The peak of a phase, in bytes, and the component, module and operation that reached it.

    `blocks` counts, of each component that is streamed, the blocks that stay in this phase, and all; empty where that
    was not worked out.
    """

    name: SimulatedPhaseName
    peak_allocated_bytes: int
    weights_bytes: int
    activation_bytes: int
    workspace_bytes: int
    component: str
    module: str
    operation: str
    blocks: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedUse:
    """A component in a phase: the most bytes it needed in addition to weights, and its work.

    `flops` are floating-point operations of products, convolutions and attention, `flops_by_kind` the same by kind and
    dtype (`convolution float32`); `traffic_bytes` are read and written by all other kernels; `launches` counts kernels,
    `forwards` calls of the component. `component` is empty for the pipeline's own code between its components.
    """

    phase: str
    component: str
    need_bytes: int
    flops: float
    traffic_bytes: int
    launches: int
    forwards: int
    flops_by_kind: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedModule:
    """The work of one module in the call, without its submodules; `name` is empty for the pipeline's own code."""

    name: str
    flops: float
    traffic_bytes: int
    launches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedLatents:
    """The latents given to a VAE: shape, strides in elements, torch dtype name, and the number of frames if given."""

    component: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    frames: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The memory after one block was allocated or freed: the `tick`th of the call.

    `weights_bytes` (by component, in the order of `Timeline.components`), `activation_bytes` and `workspace_bytes` are
    on the device; `reserved_bytes` is held by the allocator for them. `host_bytes` are in RAM, `pinned_bytes` of them
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
        """All bytes allocated on the device."""
        return sum(self.weights_bytes) + self.activation_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The memory over a call in which blocks were allocated or freed `ticks` times: a sample that holds every peak."""

    components: tuple[str, ...]
    ticks: int
    moments: tuple[Moment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation(Shown):
    """The memory and work of a pipeline call on the simulated device.

    `steps` denoising steps were run, with `evaluations` of the denoiser; a call of the workload has `call_evaluations`
    (both 0 if unknown). `fits` is None without a capacity. If the call ran out of memory, `stopped` says where,
    `stopped_in` in which phase, and `short_bytes` how much was missing at least: 0 if as much was free, but fragmented;
    `over_bytes` is how far the request, added to all that was reserved, exceeded the capacity. It was `limited` if the
    allocator met the capacity, whether or not what it then released was enough. `to_device_bytes` and
    `to_host_bytes` were transferred. `notes` lists assumptions. `modules` are in the order they first ran. `timeline`
    is None unless requested.

    `ram_bytes` and what follows it are what the settings take of the host, as in a plan (`planner.demand.HostDemand`);
    None where that was not worked out. `host_peak_bytes` is all that was in host memory at once while all of it was
    loaded before anything was placed, pages of the model's files included.
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
    ram_bytes: int | None = None
    pinned_bytes: int | None = None
    disk_bytes: int | None = None
    evaluations: int = 0
    call_evaluations: int = 0
    limited: bool = False

    def use(self, phase: str, component: str) -> SimulatedUse | None:
        """The use of a component in a phase, None if it did not run in it."""
        return next((item for item in self.uses if (item.phase, item.component) == (phase, component)), None)
