"""Values that describe a machine. Byte counts are ints; unknown is None, never 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vramplan.common.shown import Shown
from vramplan.hardware.rates import Rates

AcceleratorKind = Literal["cuda", "rocm", "xpu", "mps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A measurement named `what`: the median of its runs, the least and the most.

    `unit` is `bytes/s`, `operations/s` or `s`, seconds for one.
    """

    __pydantic_config__ = {"extra": "forbid"}

    what: str
    unit: Literal["bytes/s", "operations/s", "s"]
    median: float
    least: float
    most: float
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The free bytes by one source."""

    source: str
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """Another program on a device. `used_bytes` is None if the driver does not report it."""

    pid: int
    name: str | None
    used_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pcie:
    """A PCI Express link to the host: generation and lanes now, and the most that device and slot allow together."""

    generation: int | None
    max_generation: int | None
    width: int | None
    max_width: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Direct links to another device: their name, their count, and the address of the other end."""

    link: str
    count: int
    to: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessUsage:
    """This process' use of a device: whether it has a context, the bytes of its tensors and of torch's cache.

    `fraction` is torch's limit on this process as a share of the total, and `limit_bytes` the same in bytes of torch's
    own total, which is less than the driver's; None without a limit, or if torch does not report it.
    """

    has_context: bool
    allocated_bytes: int
    cached_bytes: int
    fraction: float
    limit_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One compute device.

    `free_bytes` is the memory available now, chosen (`free_reason` says why) from all sources (`free_readings`); None
    if unknown. `link_bytes_per_s` is the peak rate of its link to the host in one direction, before protocol overhead;
    None if not read. `identified` is false if it may be any of several devices: only their shared facts are then
    given. `part` names the kind of part it is of a card. `native` are the torch dtypes it computes in. `coherent`
    memory is its own but accessible to the host; `unified` memory is the host's. If it `spills`, an allocation beyond
    its memory is no error: it goes to host memory, and everything slows down. `others` is None if the driver does not
    list programs. `memory_node` is the NUMA node of its memory. `display` is whether a desktop is drawn on it; None if
    unknown.
    """

    kind: AcceleratorKind
    index: int
    name: str
    uuid: str | None = None
    total_bytes: int
    free_bytes: int | None
    unified: bool = False
    driver: str | None = None
    link_bytes_per_s: float | None = None
    rates: Rates | None = None
    identified: bool = True
    part: str | None = None
    architecture: str | None = None
    native: tuple[str, ...] = ()
    coherent: bool = False
    spills: bool = False
    display: bool | None = None
    free_readings: tuple[Reading, ...] = ()
    free_reason: str | None = None
    others: tuple[Process, ...] | None = None
    own: ProcessUsage | None = None
    pcie: Pcie | None = None
    peers: tuple[Peer, ...] = ()
    memory_node: int | None = None
    measured: tuple[Measurement, ...] = ()

    @property
    def device(self) -> str:
        """The torch device string, such as `cuda:0`. ROCm builds of torch call their devices `cuda`."""
        if self.kind == "mps":
            return "mps"
        return f"{'cuda' if self.kind == 'rocm' else self.kind}:{self.index}"

    @property
    def has_streams(self) -> bool:
        """Whether copies can overlap computation (diffusers' `use_stream`): CUDA, ROCm and XPU."""
        return self.kind in ("cuda", "rocm", "xpu")

    @property
    def fuses_attention(self) -> bool:
        """Whether torch's attention has a kernel on this device that never holds the full score matrix.

        Metal's holds it in the dtype of the queries, for more than 8 queries (torch 2.13, Attention.mm `sdpa`).
        """
        return self.kind != "mps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The host's resources that this process may use; a control group may limit its memory.

    `swap_total_bytes` and `swap_free_bytes` count the swap this process may use. `pinned_limit_bytes` is None if only
    the memory itself limits page-locked memory. `cores_source` says what limits the cores, if anything. The disk is
    the one that weights are offloaded to: `disk_in_memory` if it is backed by RAM, `disk_rotational` None if unknown.
    """

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None = None
    limit_source: str | None = None
    disk_free_bytes: int | None = None
    system: str | None = None
    swap_total_bytes: int | None = None
    swap_free_bytes: int | None = None
    pinned_limit_bytes: int | None = None
    pinned_source: str | None = None
    cores: int | None = None
    cores_source: str | None = None
    disk_filesystem: str | None = None
    disk_in_memory: bool = False
    disk_rotational: bool | None = None
    measured: tuple[Measurement, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware(Shown):
    """A machine: its accelerators, its host, and notes on failed readings."""

    __pydantic_config__ = {"extra": "forbid"}

    accelerators: tuple[Accelerator, ...]
    host: Host
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Deduction:
    """Bytes subtracted from a memory before planning (added if negative), and the reason."""

    memory: Literal["vram", "ram"]
    name: str
    size_bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The memory a plan may use. `vram_bytes` is None without an accelerator, `disk_bytes` if unknown. `kinds` are
    those of the call that its margin is for."""

    vram_bytes: int | None
    ram_bytes: int
    disk_bytes: int | None = None
    deductions: tuple[Deduction, ...] = ()
    kinds: tuple[str, ...] = ()
