"""What the real device's kernels hold in memory beside their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vramplan.simulator.ledger import Block, Ledger
from vramplan.simulator.shapes import aten
from vramplan.units import MIB

_MATRIX_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
_HALF = (torch.float16, torch.bfloat16)


@dataclass(slots=True)
class Kernels:
    """The kernels of one architecture. Bytes, each with where it comes from.

    `cublas_bytes` stays allocated from the first matrix product on: 8 MiB, 32 MiB on Hopper
    (CUBLAS_WORKSPACE_CONFIG, PyTorch CUDA semantics, torch 2.13). `convolution_copies` is how often a
    half-precision convolution holds its input and output again, to change their layout: 1 reproduces FLUX.1's
    published peaks at batch 1; assumed until it is fitted. Attention in one of `math_dtypes` is computed step by step;
    where it is not `fused_attention`, its kernel holds the scores.
    """

    cublas_bytes: int = 8 * MIB
    convolution_copies: float = 1.0
    math_dtypes: tuple[str, ...] = ()
    fused_attention: bool = True
    _workspaces: dict[int, Block] | None = field(default=None, init=False)

    def after(self, ledger: Ledger, packet: Any, args: Sequence[Any], made: Any) -> None:
        """Account for the workspace of an operation whose result is there already."""
        if packet in _MATRIX_PRODUCTS:
            self.hold_cublas(ledger)
        elif packet is aten.convolution:
            ledger.transient(self._convolution_bytes(args[0], made), "workspace")

    def release(self) -> None:
        """Give back what stays allocated from operation to operation."""
        self._workspaces = None

    def hold_cublas(self, ledger: Ledger) -> None:
        """Take the workspace of matrix products where this stream has none yet: nobody's, as it stays."""
        for recorder in ledger.recorders:
            recorder.product()
        self._workspaces = self._workspaces or {}
        if ledger.stream not in self._workspaces and self.cublas_bytes:
            with ledger.unrecorded():
                self._workspaces[ledger.stream] = Block(ledger, self.cublas_bytes, "device", "workspace")

    def _convolution_bytes(self, given: torch.Tensor, made: torch.Tensor) -> int:
        if given.dtype not in _HALF or given.dim() not in (4, 5):
            return 0
        channels_last = torch.channels_last if given.dim() == 4 else torch.channels_last_3d
        if given.is_contiguous(memory_format=channels_last) and not given.is_contiguous():
            return 0
        return int(self.convolution_copies * (given.numel() + made.numel()) * given.element_size())


def attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> float:
    """Floating-point operations of attention: the scores, and their product with the values."""
    rows = query.numel() // query.shape[-1]
    return 2.0 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def scores_bytes(query: torch.Tensor, key: torch.Tensor) -> int:
    """The scores of every query against every key, in the queries' dtype."""
    return query.numel() // query.shape[-1] * key.shape[-2] * query.element_size()


def attention_scratch_bytes(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> int:
    """What scaled dot product attention holds while it runs, beside its output, in bytes.

    Flash and memory-efficient kernels keep one float32 log-sum-exp for each query row. A mask rules flash
    out; the memory-efficient kernel wants its last dimension in steps of 16 elements and copies it where it
    is not (torch 2.13, transformers/cuda/attention.cu). A head size that is no multiple of 8 is padded in
    copies of query, key and value.
    """
    rows = query.numel() // query.shape[-1]
    scratch = 4 * rows
    if mask is not None and mask.shape[-1] % 16:
        scratch += mask.numel() // mask.shape[-1] * (-(-mask.shape[-1] // 16) * 16) * query.element_size()
    if query.shape[-1] % 8:
        padded = -(-query.shape[-1] // 8) * 8
        scratch += (rows + 2 * key.numel() // key.shape[-1]) * padded * query.element_size()
    return scratch
