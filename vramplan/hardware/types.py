"""What a machine has, as values. Byte counts are ints; unknown is None, never 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AcceleratorKind = Literal["cuda", "rocm", "xpu", "mps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast an accelerator is, for pricing candidates: bytes per second and operations per second.

    `reached` is the share of `half_flops_per_s`, a peak, that products and attention of a pipeline reach.
    """

    __pydantic_config__ = {"extra": "forbid"}

    memory_bytes_per_s: float
    link_bytes_per_s: float
    half_flops_per_s: float
    reached: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One compute device.

    `free_bytes` is what its driver calls free now; None where it does not say. `link_bytes_per_s` is what its
    link to the host carries one way at best, before protocol overhead; None where it was not read.
    `drives_display` is whether a desktop is drawn on it; None where the driver does not say.
    """

    __pydantic_config__ = {"extra": "forbid"}

    kind: AcceleratorKind
    index: int
    name: str
    uuid: str | None = None
    total_bytes: int
    free_bytes: int | None
    unified: bool = False
    driver: str | None = None
    link_bytes_per_s: float | None = None
    drives_display: bool | None = None
    rates: Rates | None = None

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
    """The memory this process may use: the machine's, or less where a control group limits it.

    `disk_free_bytes` is what is free where weights would be offloaded to; None where it was not read.
    """

    __pydantic_config__ = {"extra": "forbid"}

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None = None
    limit_source: str | None = None
    disk_free_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A machine: its accelerators, its host memory, and notes on what could not be read."""

    __pydantic_config__ = {"extra": "forbid"}

    accelerators: tuple[Accelerator, ...]
    host: Host
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Deduction:
    """Bytes taken off a memory before planning (negative: given back), and why."""

    __pydantic_config__ = {"extra": "forbid"}

    memory: Literal["vram", "ram"]
    name: str
    size_bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a plan may use. `vram_bytes` is None where there is no accelerator, `disk_bytes` where it is not known."""

    __pydantic_config__ = {"extra": "forbid"}

    vram_bytes: int | None
    ram_bytes: int
    disk_bytes: int | None = None
    deductions: tuple[Deduction, ...] = ()
