"""The workspace memory of the real device's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vramplan.hardware.rates import WIDE_HEAD
from vramplan.simulator.ledger import Block, Ledger
from vramplan.simulator.shapes import aten
from vramplan.units import MIB

_MATRIX_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
_HALF = (torch.float16, torch.bfloat16)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# Elements from which on the output of a half-precision convolution is not copied; see `Kernels.convolution_bytes`.
_OUTPUT_LIMIT, _WIDENING_LIMIT = 1 << 31, 1 << 30


@dataclass(slots=True)
class Kernels:
    """The kernels of one architecture.

    `cublas_bytes` stays allocated from the first matrix product on: 8 MiB, 32 MiB on Hopper
    (CUBLAS_WORKSPACE_CONFIG, PyTorch CUDA semantics, torch 2.13). With `tf32` float32 convolutions run on tensor cores
    (Ampere and later). Attention in one of `math_dtypes` is computed step by step; without `fused_attention` its
    kernel holds the score matrix.
    """

    cublas_bytes: int = 8 * MIB
    tf32: bool = True
    math_dtypes: tuple[str, ...] = ()
    fused_attention: bool = True
    _workspaces: dict[int, Block] | None = field(default=None, init=False)

    def count_workspace(self, ledger: Ledger, packet: Any, args: Sequence[Any], made: Any) -> None:
        """Account for the workspace of an operation that has produced its result `made`."""
        if packet in _MATRIX_PRODUCTS:
            self.hold_cublas(ledger)
        elif packet is aten.convolution:
            ledger.transient(self.convolution_bytes(args[0], made), "workspace")

    def release(self) -> None:
        """Free the workspaces that stay allocated between operations."""
        self._workspaces = None

    def hold_cublas(self, ledger: Ledger) -> None:
        """Allocate the workspace of matrix products once per stream. It belongs to no forward, as it stays."""
        for recorder in ledger.recorders:
            recorder.on_product()
        self._workspaces = self._workspaces or {}
        if ledger.stream not in self._workspaces and self.cublas_bytes:
            with ledger.pause_recording():
                self._workspaces[ledger.stream] = Block(ledger, self.cublas_bytes, "device", "workspace")

    def convolution_bytes(self, given: torch.Tensor, made: torch.Tensor) -> int:
        """The workspace of a convolution: the copies in which its tensor-core kernel reads and writes channels last.

        Half precision: a copy of the input, and one of the output unless that has 2^31 elements, or (4-D) 2^30 and at
        least as many channels as the input. float32 with `tf32`: the input alone. An input in channels last: nothing.

        Fitted on 20 published peaks (0.2 % off on average), and on no card of ours: benchmarks/gpu_accuracy.py has the
        shapes that will judge it. The part on float32 rests on two sources and four rows, all of one VAE; the 4-D limit
        on one model and one card, and was chosen after its rows were seen. Before Ampere, float32 is not known, and
        nothing is counted.
        """
        if given.dim() not in _CHANNELS_LAST or _is_channels_last(given):
            return 0
        if given.dtype == torch.float32:
            return given.numel() * given.element_size() if self.tf32 else 0
        if given.dtype not in _HALF:
            return 0
        widens = given.dim() == 4 and made.shape[1] >= given.shape[1]
        copied = made.numel() < (_WIDENING_LIMIT if widens else _OUTPUT_LIMIT)
        return (given.numel() + copied * made.numel()) * given.element_size()


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=_CHANNELS_LAST[tensor.dim()]) and not tensor.is_contiguous()


def product_kind(packet: Any, given: torch.Tensor) -> str:
    """The kind of a product and its dtype, as `hardware.rates` prices it: `convolution float32`."""
    kind = "convolution" if packet is aten.convolution else "product"
    return f"{kind} {str(given.dtype).removeprefix('torch.')}"


def attention_kind(query: torch.Tensor, mask: torch.Tensor | None) -> str:
    """The kind of fused attention: `wide` are heads of at least 128 without a mask, which have the fastest kernels."""
    kind = "wide_attention" if query.shape[-1] >= WIDE_HEAD and mask is None else "attention"
    return f"{kind} {str(query.dtype).removeprefix('torch.')}"


def attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> float:
    """Floating-point operations of attention: the scores, and their product with the values."""
    rows = query.numel() // query.shape[-1]
    return 2.0 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def scores_bytes(query: torch.Tensor, key: torch.Tensor) -> int:
    """The bytes of the score matrix, every query against every key, in the queries' dtype."""
    return query.numel() // query.shape[-1] * key.shape[-2] * query.element_size()


def attention_scratch_bytes(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> int:
    """The memory of scaled dot product attention in addition to its output, in bytes.

    Flash and memory-efficient kernels keep one float32 log-sum-exp for each query row. A mask rules flash out; the
    memory-efficient kernel needs its last dimension in multiples of 16 elements and copies it otherwise (torch 2.13,
    transformers/cuda/attention.cu). If the head size is no multiple of 8, query, key and value are copied and padded.
    """
    rows = query.numel() // query.shape[-1]
    scratch = 4 * rows
    if mask is not None and mask.shape[-1] % 16:
        scratch += mask.numel() // mask.shape[-1] * (-(-mask.shape[-1] // 16) * 16) * query.element_size()
    if query.shape[-1] % 8:
        padded = -(-query.shape[-1] // 8) * 8
        scratch += (rows + 2 * key.numel() // key.shape[-1]) * padded * query.element_size()
    return scratch
