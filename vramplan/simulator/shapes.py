"""Read the device, shape and value of tensors, simulated or real."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vramplan.simulator.ledger import Place
from vramplan.simulator.tensor import SimTensor, tensors_in

aten = torch.ops.aten
CPU = torch.device("cpu")
META = torch.device("meta")

# Operations whose result has the layout of their largest argument if the dtypes agree: torch's own meta functions
# for these are written in Python and would take most of a simulation's time.
_POINTWISE = frozenset(
    getattr(aten, name)
    for name in (
        *("add", "sub", "mul", "div", "silu", "gelu", "relu", "sigmoid", "tanh", "exp", "neg", "sqrt", "rsqrt"),
        *("sin", "cos", "clamp", "abs"),
    )
)


def bytes_touched(args: Any, made: Any) -> int:
    """The bytes read and written: all tensors in arguments and results."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in((args, made)))


def pointwise_result(packet: Any, shapes: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The result of a pointwise operation as a meta tensor; None if torch has to infer it."""
    if packet not in _POINTWISE or not shapes:
        return None
    largest = max(shapes, key=lambda shape: (shape.dim(), shape.numel()))
    if not largest.is_floating_point() or not largest.is_contiguous():
        return None
    for shape in shapes:
        # Zero-dimensional numbers never widen a floating tensor's dtype.
        if shape is largest or (shape.dim() == 0 and shape.dtype != torch.complex64):
            continue
        if shape.dtype != largest.dtype or not _broadcasts_to(shape.shape, largest.shape):
            return None
    return torch.empty_like(largest)


def _broadcasts_to(small: Sequence[int], large: Sequence[int]) -> bool:
    """Whether `small` broadcasts to `large` without changing it."""
    return all(size in (1, full) for size, full in zip(reversed(small), reversed(large), strict=False))


def label_of(tensor: torch.Tensor) -> torch.device:
    """The device of a tensor, simulated or real."""
    return tensor.label if isinstance(tensor, SimTensor) else tensor.device


def normalize_device(device: torch.device | str | int) -> torch.device:
    """The device with its index: `cuda` becomes `cuda:0`; the CPU has none."""
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type in ("cpu", "meta"):
        return torch.device(found.type)
    return torch.device(found.type, found.index or 0)


def place_of(label: torch.device) -> Place:
    """The ledger's place for memory of that device."""
    return {"cpu": "host", "meta": "nowhere"}.get(label.type, "device")  # type: ignore[return-value]


def value_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The value of a tensor, None if unknown; a real tensor is its own value."""
    if isinstance(tensor, SimTensor):
        return tensor.value
    return None if tensor.device.type == "meta" else tensor


def shape_of(tensor: torch.Tensor) -> torch.Tensor:
    """The meta tensor with the shape of a tensor."""
    return tensor.meta if isinstance(tensor, SimTensor) else meta_like(tensor)


def meta_like(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor of the same shape, strides and dtype."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def forget_values(func: Any, args: Any, kwargs: Any) -> None:
    """Mark the values of the tensors that an operation writes to, and of their views, as unknown."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in tensors_in(given):
                if isinstance(tensor, SimTensor):
                    tensor.block.known = False


def update_shape(tensor: SimTensor, shape: torch.Tensor) -> None:
    """Give the tensor the new shape after an operation that changed it in place (`unsqueeze_`)."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():
        tensor.as_strided_(shape.shape, shape.stride(), shape.storage_offset())
