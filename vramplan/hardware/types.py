"""What a machine has, as values. Byte counts are ints; unknown is None, never 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vramplan.common.shown import Shown

AcceleratorKind = Literal["cuda", "rocm", "xpu", "mps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast an accelerator is, for pricing candidates: bytes per second and operations per second.

    `reached` is the share of `half_flops_per_s`, a peak, that products and attention of a pipeline reach.
    """

    memory_bytes_per_s: float
    link_bytes_per_s: float
    half_flops_per_s: float
    reached: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What was measured on a machine: the middle of the runs, the least and the most; `what` names it.

    `unit` is `bytes/s` or `operations/s`.
    """

    __pydantic_config__ = {"extra": "forbid"}

    what: str
    unit: Literal["bytes/s", "operations/s"]
    median: float
    least: float
    most: float
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one source calls free."""

    source: str
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """Another program on a device. `used_bytes` is None where the driver does not say."""

    pid: int
    name: str | None
    used_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pcie:
    """A link to the host: generation and lanes now, and the most that device and slot allow together."""

    generation: int | None
    max_generation: int | None
    width: int | None
    max_width: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A direct link to another device: what it is called, how many links, and the identity of the other end."""

    link: str
    count: int
    to: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessUsage:
    """What this very process has on a device: a context or not, what its tensors hold, and what torch has cached.

    `fraction` is torch's limit on this process, as a share of the total, and `limit_bytes` what that comes to by
    torch's own total, which is less than the driver's; None where there is no limit, or torch does not say.
    """

    has_context: bool
    allocated_bytes: int
    cached_bytes: int
    fraction: float
    limit_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One compute device.

    `free_bytes` is what may be taken of it now, by the source that is believed (`free_reason` says why) of all
    that were asked (`free_readings`); None where none says. `link_bytes_per_s` is what its link to the host
    carries one way at best, before protocol overhead; None where it was not read. `identified` is false where
    the device may be any of several, and only what they have in common is said. `part` says of what it is a
    part. `native` are the torch dtypes it computes in. `coherent` memory is its own but open to the host;
    `unified` memory is the host's. Where it `spills`, too much memory is no error: it goes to host memory, and
    everything gets slow. `others` is None where the driver does not say who uses it. `memory_node` is the NUMA
    node that its memory makes. `display` is whether a desktop is drawn on it; None where the driver does not say.
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
        """The torch device string. ROCm builds of torch call their devices `cuda`."""
        if self.kind == "mps":
            return "mps"
        return f"{'cuda' if self.kind == 'rocm' else self.kind}:{self.index}"

    @property
    def has_streams(self) -> bool:
        """Whether copies can overlap compute (diffusers' `use_stream`): CUDA, ROCm and XPU."""
        return self.kind in ("cuda", "rocm", "xpu")

    @property
    def fuses_attention(self) -> bool:
        """Whether torch's attention has a kernel here that never holds the scores of all tokens against all.

        Metal's holds them in the dtype of the queries, for more than 8 of these (torch 2.13, Attention.mm `sdpa`).
        """
        return self.kind != "mps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What this process may use: the machine's memory, or less where a control group limits it.

    `swap_total_bytes` and `swap_free_bytes` count what this process may use of it. `pinned_limit_bytes` is None
    where only the memory itself limits it. `cores_source` says what limits the cores, if anything does. The disk
    is the one that weights would be offloaded to: `disk_in_memory` where it is RAM in truth, `disk_rotational`
    None where nothing says.
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
    """A machine: its accelerators, its host memory, and notes on what could not be read."""

    __pydantic_config__ = {"extra": "forbid"}

    accelerators: tuple[Accelerator, ...]
    host: Host
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Deduction:
    """Bytes taken off a memory before planning (negative: given back), and why."""

    memory: Literal["vram", "ram"]
    name: str
    size_bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a plan may use. `vram_bytes` is None where there is no accelerator, `disk_bytes` where it is not known."""

    vram_bytes: int | None
    ram_bytes: int
    disk_bytes: int | None = None
    deductions: tuple[Deduction, ...] = ()
