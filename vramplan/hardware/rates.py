"""The rates of a machine: each with its source, or the published timings it was fitted on.

Most shares come from a study of 98 published timings of 11 cards and 15 models (November 2026), not all of them in
this repository. `benchmarks/times.py` can fit the same constants from a neutral start on the 50 rows here that may
be fitted on; what it finds stands beside (`here`). Rows are named as in `benchmarks/published_times.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

# Copies from pageable memory pass through a small pinned buffer of the driver: about half the pinned rate is usual
# (NVIDIA, "How to Optimize Data Transfers in CUDA C/C++", bandwidthTest figures), and one core of the host copies no
# more than this: fitted on flux_pr11682_3.
_PAGEABLE_SHARE, _PAGEABLE_MOST = 0.5, 12e9
# The share of what is hidden behind something longer that is paid all the same. By leaves 0.5 to 0.8 of the shorter
# (FLUX.1, 0.535 s resident and 1.879 s streamed: huggingface.co/datasets/diffusers/benchmarks); by blocks nobody has
# published both times, 0.05 is assumed: copies take memory bandwidth.
UNHIDDEN = {"block": 0.05, "leaf": 0.65}


# What the rates of products rest on: a measurement of this machine, published timings of the card's architecture, or
# nothing but a likeness to another architecture.
RatesBasis = Literal["measured", "fitted", "assumed"]

# The head size from which attention without a mask has the fastest kernels: the kind `wide_attention`.
WIDE_HEAD = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """The factors that computing and moving weights were at most off by in a stated share of published timings."""

    computing: float
    moving: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The rates of an accelerator and its host, to price candidates: per second, or seconds for one.

    `reached` is the share of the peak `half_flops_per_s` that a pipeline's products reach; kinds of operations and
    dtypes have shares of that, `stream_share` is of the link. `pageable_bytes_per_s` is None for half the link.
    `measured` names what was measured on the machine itself, for people: `launches`. `basis` is that of `reached`
    before anything was measured; `uncertainty` is None where nothing tells how far off times may be.
    """

    memory_bytes_per_s: float
    link_bytes_per_s: float  # from pinned memory
    half_flops_per_s: float
    reached: float
    source: str
    # Cards without a profile: between data-centre and consumer cards. Assumed.
    float32_share: float = 0.25
    tf32_share: float = 0.5
    bfloat16_share: float = 1.0
    # From the study; here 0.83, 2.9, 1.0 and 0.92, with products a tenth slower: 50 rows do not tell them apart.
    convolution_share: float = 0.67
    wide_attention_share: float = 1.6
    attention_share: float = 0.8
    memory_share: float = 0.815
    # Between the study's 32 microseconds and 50 here (torch2_a100-40gb_b1 51, fal_sd15 37): the host decides.
    launch_seconds: float = 36e-6
    pageable_bytes_per_s: float | None = None
    # From the study; here 0.9. Rows of model offload and qwen_pr12910 give 0.26 to 2.75 GB/s.
    back_bytes_per_s: float = 1.2e9
    # Streams copy tensor by tensor: here 0.53 (flux_pr11106_*), others report 0.8 and more (flux_pr11081_*).
    stream_share: float = 0.65
    # Streams that copy whole blocks: what bandwidthTest reaches with large copies. Assumed.
    flat_share: float = 0.95
    disk_bytes_per_s: float = 2e9  # an NVMe drive of a laptop on PCIe 3.0. Assumed.
    # accelerate's hooks of one leaf: between the study's 0.56 ms (0.3 to 1.9) and 1.2 ms here, mostly of p100_*.
    leaf_seconds: float = 0.8e-3
    pause_seconds: float = 1e-4  # waiting for one transfer: a synchronisation and a launch. Assumed.
    measured: tuple[str, ...] = ()
    basis: RatesBasis = "assumed"
    uncertainty: Uncertainty | None = None

    @property
    def from_pageable_bytes_per_s(self) -> float:
        """The rate of copies from pageable memory to the device."""
        return self.pageable_bytes_per_s or min(_PAGEABLE_SHARE * self.link_bytes_per_s, _PAGEABLE_MOST)

    def flops_per_s(self, kind: str) -> float:
        """The rate of operations of a kind and dtype (`convolution float32`), which is never above the peak."""
        what, _, dtype = kind.partition(" ")
        share: float = getattr(self, f"{what}_share", 1.0)
        if dtype == "float32":
            share *= self.tf32_share if what == "convolution" else self.float32_share
        elif dtype == "bfloat16":
            share *= self.bfloat16_share
        return self.half_flops_per_s * min(1.0, self.reached * share)


def slower(rates: Rates) -> Mapping[str, tuple[float, Rates]]:
    """The machine with one of its terms slower, by as much as published times were off: for each term a factor on
    computing, and the rates. Empty where that is not known."""
    known = rates.uncertainty
    if known is None:
        return {}
    off, pageable = known.moving, rates.from_pageable_bytes_per_s
    changes: dict[str, dict[str, Any]] = {
        "pinned": {"link_bytes_per_s": rates.link_bytes_per_s / off, "pageable_bytes_per_s": pageable},
        "pageable": {"pageable_bytes_per_s": pageable / off, "back_bytes_per_s": rates.back_bytes_per_s / off},
        "files": {"disk_bytes_per_s": rates.disk_bytes_per_s / off},
        "hooks": {"leaf_seconds": rates.leaf_seconds * off, "pause_seconds": rates.pause_seconds * off},
    }
    moving = {name: (1.0, replace(rates, **changed)) for name, changed in changes.items()}
    return {"computing": (known.computing, rates), **moving}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The shares that CUDA cards from one compute capability on reach: of their own peak in half precision, and of that
    in float32 (datasheets), for convolutions with TF32 where there is any (torch's default). `basis` is that of
    `reached`."""

    since: float
    reached: float
    float32: float
    tf32: float
    basis: RatesBasis = "fitted"


# `reached`: from the study; here 0.77 Pascal, 0.45 A100, 0.77 consumer Ampere (taken), 0.37 Hopper, with other shares
# found here too. No row may be fitted on for Volta and Ada (bench_flux_*, whose card is inferred, agree with Ada's
# within 3 %). Turing is taken to be like Volta, Blackwell like the cards before it: assumed. A profile may differ.
ARCHITECTURES = (
    Architecture(since=0.0, reached=0.87, float32=1.0, tf32=1.0),
    Architecture(since=7.0, reached=0.45, float32=0.125, tf32=0.125),
    Architecture(since=7.5, reached=0.45, float32=0.2, tf32=0.2, basis="assumed"),
    Architecture(since=8.0, reached=0.53, float32=0.0625, tf32=0.5),
    Architecture(since=8.6, reached=0.77, float32=0.5, tf32=0.5),
    Architecture(since=8.9, reached=0.84, float32=0.5, tf32=0.5),
    Architecture(since=9.0, reached=0.40, float32=0.067, tf32=0.5),
    Architecture(since=10.0, reached=0.40, float32=0.067, tf32=0.5, basis="assumed"),
    Architecture(since=12.0, reached=0.84, float32=0.5, tf32=0.5, basis="assumed"),
)
# Cards of other vendors: nobody's timings were at hand. Assumed.
UNKNOWN_REACHED = 0.6


def architecture(capability: float | None) -> Architecture | None:
    """The architecture of a CUDA card; None without a compute capability."""
    if capability is None:
        return None
    return next(item for item in reversed(ARCHITECTURES) if capability >= item.since)
