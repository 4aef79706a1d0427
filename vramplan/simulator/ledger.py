"""Account for the memory of a simulation: who holds how much, and where the peaks are.

Every tensor of the simulation holds a `Block`; views share one. A block is freed when Python drops the last reference
to it, as PyTorch frees memory on a real device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from vramplan.simulator.allocator import CachingAllocator, Chunk, DeviceFullError
from vramplan.simulator.types import SimulatedPhaseName
from vramplan.units import format_bytes

Kind = Literal["weights", "activation", "workspace"]
Place = Literal["device", "host", "pinned", "nowhere"]
KINDS: tuple[Kind, ...] = ("weights", "activation", "workspace")


class Block:
    """Memory that one or more tensors share, freed with the last of them.

    `owner` is the component that it belongs to, by default the one that runs.
    """

    __slots__ = ("__weakref__", "chunk", "kind", "known", "ledger", "owner", "place", "size")

    def __init__(self, ledger: Ledger, size: int, place: Place, kind: Kind, owner: str = "") -> None:
        self.ledger = ledger
        self.size = size
        self.place = place
        self.kind = kind
        self.owner = owner or ledger.component
        self.known = True  # whether the stored values of its tensors are still valid
        self.chunk: Chunk | None = None
        ledger.allocate(self)

    def __del__(self) -> None:
        self.ledger.free(self)


@dataclass(slots=True, kw_only=True)
class PhasePeak:
    """The peak of a phase: bytes on the device by kind, and the component, module and operation that reached it."""

    allocated_bytes: int = 0
    by_kind: Mapping[Kind, int] = field(default_factory=dict)
    component: str = ""
    module: str = ""
    operation: str = ""


@dataclass(slots=True)
class Cost:
    """The work of a component in a phase: floating-point operations (all, and by kind and dtype), bytes read and
    written by the kernels that have none, kernel launches, and forwards."""

    flops: float = 0.0
    flops_by_kind: dict[str, float] = field(default_factory=dict)
    traffic_bytes: int = 0
    launches: int = 0
    forwards: int = 0

    def add(self, other: Cost) -> None:
        """Add the kernels of another cost; forwards are not added."""
        self.flops += other.flops
        for kind, flops in other.flops_by_kind.items():
            self.flops_by_kind[kind] = self.flops_by_kind.get(kind, 0.0) + flops
        self.traffic_bytes += other.traffic_bytes
        self.launches += other.launches


# A block was allocated: its number, size, place and kind, the module (relative to the recorded one) and operation.
# Bytes were moved: source, target, count.
AllocateEvent = tuple[int, int, Place, Kind, str, str]
MoveEvent = tuple[str, str, int]


@dataclass(slots=True, kw_only=True)
class Recorder:
    """The ledger events of one module's forward, in order, so that they can be replayed.

    A number is a block that is freed; None is the first matrix product, whose workspace stays. `alive` holds the
    numbers of blocks allocated and not yet freed, by their id. `releasable` has the indices of arguments in lists, by
    the id of their block: the forward may replace these, and free them, which is -1 less the index. The recorder is
    `broken` if the forward freed another block that existed before, or an event belongs to a module outside of it.
    """

    name: str
    events: list[int | AllocateEvent | MoveEvent | None] = field(default_factory=list)
    costs: dict[str, Cost] = field(default_factory=dict)
    alive: dict[int, int] = field(default_factory=dict)
    releasable: dict[int, int] = field(default_factory=dict)
    operations: int = 0
    count: int = 0
    multiplied: bool = False
    broken: bool = False

    def on_allocate(self, block: Block, module: str, operation: str) -> None:
        """Record an allocated block."""
        self.alive[id(block)] = self.count
        self.events.append((self.count, block.size, block.place, block.kind, self._inner(module), operation))
        self.count += 1

    def on_free(self, block: Block) -> None:
        """Record a freed block."""
        number = self.alive.pop(id(block), None)
        if number is None and (index := self.releasable.pop(id(block), None)) is not None:
            number = -1 - index
        self.broken |= number is None
        self.events.append(number)

    def on_count(self, module: str, cost: Cost) -> None:
        """Record kernels counted for a module."""
        self.costs.setdefault(self._inner(module), Cost()).add(cost)

    def on_transfer(self, source: str, target: str, size: int) -> None:
        """Record bytes moved."""
        self.events.append((source, target, size))

    def on_read(self, block: Block) -> None:
        """Record nothing: the weight stays where it is."""

    def on_empty_cache(self) -> None:
        """Give up: a forward that releases cached segments cannot be replayed."""
        self.broken = True

    def on_product(self) -> None:
        """Record a matrix product; only the first is an event."""
        if not self.multiplied:
            self.multiplied = True
            self.events.append(None)

    def _inner(self, module: str) -> str:
        self.broken |= not module.startswith(self.name)
        return module[len(self.name) :]


class Listener(Protocol):
    """Whoever is told of a ledger's events: see `Recorder`."""

    broken: bool

    def on_allocate(self, block: Block, module: str, operation: str) -> None:
        """A block was allocated."""

    def on_free(self, block: Block) -> None:
        """A block was freed."""

    def on_count(self, module: str, cost: Cost) -> None:
        """Kernels were counted for a module."""

    def on_transfer(self, source: str, target: str, size: int) -> None:
        """Bytes were moved."""

    def on_read(self, block: Block) -> None:
        """A weight was read outside of its component."""

    def on_empty_cache(self) -> None:
        """Cached segments were released."""

    def on_product(self) -> None:
        """A matrix product ran."""


class Ledger:
    """The memory accounting of one simulation. The caller keeps phase, component and modules up to date.

    `observe` is called with each block allocated or freed, and the change of the device's memory in bytes. A full
    device raises `out_of_memory`.
    """

    def __init__(
        self,
        allocator: CachingAllocator,
        observe: Callable[[Ledger, Block, int], None] | None = None,
        *,
        out_of_memory: type[Exception] = MemoryError,
    ) -> None:
        self.allocator = allocator
        self.observe = observe
        self.out_of_memory = out_of_memory
        self.on_device: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self.host_bytes = 0
        self.pinned_bytes = 0
        self.peak_host_bytes = 0
        self.peak_pinned_bytes = 0
        self.stream = 0
        self.phase: SimulatedPhaseName = "load"
        self.component = ""
        self.modules: list[str] = []
        self.operation = ""
        self.operations = 0
        self.short_bytes = 0
        self.over_bytes = 0
        self.costs: dict[tuple[str, str], Cost] = {}
        self.module_costs: dict[str, Cost] = {}
        self.peaks: dict[SimulatedPhaseName, PhasePeak] = {}
        self.needs: dict[tuple[str, str], int] = {}  # peak in addition to weights, by phase and component
        self.moved_bytes: dict[tuple[str, str], int] = {}
        self.recorders: list[Listener] = []

    @contextmanager
    def pause_recording(self) -> Iterator[None]:
        """Context manager: events inside belong to no module's forward."""
        recorders, self.recorders = self.recorders, []
        try:
            yield
        finally:
            self.recorders = recorders

    @property
    def module(self) -> str:
        """The name of the module that runs now; empty outside of all modules."""
        return self.modules[-1] if self.modules else ""

    @property
    def doing(self) -> str:
        """The operation that runs now; empty while weights are loaded, which is not a call's."""
        return "" if self.phase == "load" else self.operation

    def start_loading(self) -> None:
        """Begin the load phase: weights move to the device, and no component runs."""
        self.phase, self.component, self.operation = "load", "", ""
        self.modules.clear()

    def allocate(self, block: Block) -> None:
        """Allocate a block. Raises `out_of_memory` if the device is full."""
        if block.place == "device" and block.size:  # torch allocates nothing for an empty tensor
            try:
                block.chunk = self.allocator.allocate(block.size, self.stream)
            except DeviceFullError as error:
                raise self._out_of_memory(error) from error
            self.on_device[block.kind] += block.chunk.size
            self._note_peak()
        elif block.place == "host":
            self.host_bytes += block.size
            self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes + self.pinned_bytes)
        elif block.place == "pinned":
            self.pinned_bytes += block.size
            self.peak_pinned_bytes = max(self.peak_pinned_bytes, self.pinned_bytes)
            self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes + self.pinned_bytes)
        for recorder in self.recorders:
            recorder.on_allocate(block, self.module, self.operation)
        if self.observe is not None:
            self.observe(self, block, block.chunk.size if block.chunk is not None else 0)

    def _out_of_memory(self, error: DeviceFullError) -> Exception:
        self.short_bytes = max(0, error.requested_bytes + error.allocated_bytes - error.capacity_bytes)
        self.over_bytes = max(1, error.requested_bytes + error.reserved_bytes - error.capacity_bytes)
        where = self.module or self.component or "the pipeline"
        doing = self.doing or "moving weights"
        return self.out_of_memory(
            f"simulated device out of memory in {doing} of {where} ({self.phase}): tried to allocate "
            f"{format_bytes(error.requested_bytes)} with {format_bytes(error.allocated_bytes)} allocated and "
            f"{format_bytes(error.reserved_bytes)} reserved of {format_bytes(error.capacity_bytes)}"
        )

    def free(self, block: Block) -> None:
        """Free a block."""
        size = 0
        if block.place == "device" and block.chunk is not None:
            size = block.chunk.size  # free neighbours are merged into it afterwards
            self.on_device[block.kind] -= size
            self.allocator.free(block.chunk)
        elif block.place == "host":
            self.host_bytes -= block.size
        elif block.place == "pinned":
            self.pinned_bytes -= block.size
        for recorder in self.recorders:
            recorder.on_free(block)
        if self.observe is not None:
            self.observe(self, block, -size)

    def transient(self, size: int, kind: Kind) -> None:
        """Allocate and free at once, as a kernel does with memory it needs while it runs."""
        if size:
            Block(self, size, "device", kind)

    def count_transfer(self, source: str, target: str, size: int) -> None:
        """Count bytes moved between host and device."""
        key = (source, target)
        self.moved_bytes[key] = self.moved_bytes.get(key, 0) + size
        for recorder in self.recorders:
            recorder.on_transfer(source, target, size)

    def empty_cache(self) -> None:
        """Release what the allocator holds and nobody uses."""
        self.allocator.empty_cache()
        for recorder in self.recorders:
            recorder.on_empty_cache()

    def note_read(self, tensor: Any) -> None:
        """Note that a tensor is read on the device it is on, which a weight outside of its component may not be."""
        block = getattr(tensor, "block", None)
        if block is not None and block.kind == "weights" and block.owner != self.component:
            for recorder in self.recorders:
                recorder.on_read(block)

    def count_kernel(self, flops: float = 0.0, traffic_bytes: int = 0, kind: str = "") -> None:
        """Count a kernel for the component and the module that run; `kind` is of its operations, with the dtype."""
        by_kind = {kind: float(flops)} if flops else {}
        self.count(self.module, Cost(flops=flops, flops_by_kind=by_kind, traffic_bytes=traffic_bytes, launches=1))

    def count(self, module: str, cost: Cost) -> None:
        """Count kernels for the component that runs, and for this module."""
        self.cost.add(cost)
        self.module_costs.setdefault(module, Cost()).add(cost)
        for recorder in self.recorders:
            recorder.on_count(module, cost)

    @property
    def cost(self) -> Cost:
        """The cost of the component that runs now, in this phase."""
        key = (self.phase, self.component)
        found = self.costs.get(key)
        if found is None:
            found = self.costs[key] = Cost()
        return found

    def _note_peak(self) -> None:
        allocated = self.allocator.allocated_bytes
        key, need = (self.phase, self.component), allocated - self.on_device["weights"]
        if need > self.needs.get(key, -1):
            self.needs[key] = need
        peak = self.peaks.get(self.phase)
        if peak is None:
            peak = self.peaks[self.phase] = PhasePeak()
        if allocated > peak.allocated_bytes:
            peak.allocated_bytes = allocated
            peak.by_kind = dict(self.on_device)
            peak.component = self.component
            peak.module = self.module
            peak.operation = self.doing
