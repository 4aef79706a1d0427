"""Handlers for operations that need more than shapes: data-dependent results, and copies between devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vramplan.simulator.shapes import META, aten, meta_like, value_of
from vramplan.simulator.tensor import Runner, SimTensor, tensors_in

Handler = Callable[[Runner, Any, Any, Any, Sequence[torch.Tensor], torch.device], Any]


def _item(engine: Runner, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: Any) -> Any:
    tensor = args[0]
    kind = bool if tensor.dtype == torch.bool else float if tensor.dtype.is_floating_point else int
    return engine.scalar(tensor, kind)


def _nonzero(engine: Runner, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: Any) -> Any:
    tensor = args[0]
    if isinstance(tensor, SimTensor) and tensor.value is not None:
        return NotImplemented
    engine.note("an unknown mask was assumed to select everything")
    shape = torch.empty((tensor.numel(), tensor.dim()), dtype=torch.int64, device="meta")
    return engine.new(shape, label)


def _index(engine: Runner, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: Any) -> Any:
    """Replace boolean masks with as many indices as they select, so that the shape is known."""
    if not any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1])):
        return NotImplemented
    if all(value_of(tensor) is not None for tensor in tensors):
        return NotImplemented
    indices: list[Any] = []
    for mask in args[1]:
        if mask is None or mask.dtype not in (torch.bool, torch.uint8):
            indices.append(mask)
            continue
        value = value_of(mask)
        if value is None:
            engine.note("an unknown mask was assumed to select everything")
        count = mask.numel() if value is None else int(value.sum())
        picked = torch.empty((count,), dtype=torch.int64, device="meta")
        indices += [engine.new(picked, label) for _ in range(mask.dim())]
    return engine.run_on_shapes(
        func, (args[0], indices, *args[2:]), kwargs, list(tensors_in((args[0], indices, args[2:]))), label
    )


def _bincount(engine: Runner, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: Any) -> Any:
    """Count each number. Unknown ones count as 0: a router then sends all tokens to the first expert."""
    if all(value_of(tensor) is not None for tensor in tensors):
        return NotImplemented
    engine.note("unknown numbers were assumed to be all 0 when they were counted")
    counts = torch.zeros(max(1, kwargs.get("minlength", args[2] if len(args) > 2 else 0)), dtype=torch.int64)
    counts[0] = args[0].numel()
    return engine.new(meta_like(counts), label, "activation", counts)


def _masked_select(
    engine: Runner, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: Any
) -> Any:
    mask = value_of(args[1])
    if all(value_of(tensor) is not None for tensor in tensors):
        return NotImplemented
    if mask is None:
        engine.note("an unknown mask was assumed to select everything")
    shape = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
    count = math.prod(shape) if mask is None else int(mask.expand(shape).sum())
    return engine.new(torch.empty((count,), dtype=args[0].dtype, device="meta"), label)


def _unique(engine: Runner, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: Any) -> Any:
    """The unique values, the inverse indices, and the counts."""
    if value_of(args[0]) is not None:
        return NotImplemented
    engine.note("unknown numbers were assumed to be all different")
    count = args[0].numel()
    values = torch.empty((count,), dtype=args[0].dtype, device="meta")
    inverse, counts = (torch.empty(s, dtype=torch.int64, device="meta") for s in (args[0].shape, (count,)))
    return tuple(engine.new(made, label) for made in (values, inverse, counts))


def _to_copy(engine: Runner, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: Any) -> Any:
    device = kwargs.get("device")
    return engine.convert(
        args[0],
        None if device is None or torch.device(device) == META else device,
        kwargs.get("dtype"),
        copy=True,
        memory_format=kwargs.get("memory_format"),
    )


HANDLERS: dict[Any, Handler] = {
    aten._local_scalar_dense: _item,
    aten.nonzero: _nonzero,
    aten.index: _index,
    aten.index_put_: _index,
    aten.index_put: _index,
    aten._to_copy: _to_copy,
    aten.bincount: _bincount,
    aten.masked_select: _masked_select,
    aten._unique2: _unique,
}
