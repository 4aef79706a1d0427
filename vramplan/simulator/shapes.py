"""What a simulated tensor is without its memory: its device, its shape, its value where it has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vramplan.simulator.ledger import Place
from vramplan.simulator.tensor import SimTensor, tensors_in

aten = torch.ops.aten
CPU = torch.device("cpu")
META = torch.device("meta")

# Operations whose result is like their largest argument, where all agree in dtype: torch's own meta functions
# for these are written in Python and would take most of a simulation's time.
_POINTWISE = frozenset(
    getattr(aten, name)
    for name in (
        *("add", "sub", "mul", "div", "silu", "gelu", "relu", "sigmoid", "tanh", "exp", "neg", "sqrt", "rsqrt"),
        *("sin", "cos", "clamp", "abs"),
    )
)


def traffic(args: Any, made: Any) -> int:
    """Bytes of every tensor read and written."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in((args, made)))


def pointwise_result(packet: Any, shapes: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The result's shape, told at once where it is plain; None where torch has to work it out."""
    if packet not in _POINTWISE or not shapes:
        return None
    largest = max(shapes, key=lambda shape: (shape.dim(), shape.numel()))
    if not largest.is_floating_point() or not largest.is_contiguous():
        return None
    for shape in shapes:
        # Numbers of no dimension never widen a floating tensor's dtype.
        if shape is largest or (shape.dim() == 0 and shape.dtype != torch.complex64):
            continue
        if shape.dtype != largest.dtype or not _broadcasts_to(shape.shape, largest.shape):
            return None
    return torch.empty_like(largest)


def _broadcasts_to(small: Sequence[int], large: Sequence[int]) -> bool:
    """Whether a shape broadcasts to the other one and leaves it as it is."""
    return all(size in (1, full) for size, full in zip(reversed(small), reversed(large), strict=False))


def label_of(tensor: torch.Tensor) -> torch.device:
    """The device a tensor is, or would be, on."""
    return tensor.label if isinstance(tensor, SimTensor) else tensor.device


def normalize_device(device: torch.device | str | int) -> torch.device:
    """With its index: `cuda` is `cuda:0`; the CPU has none."""
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type in ("cpu", "meta"):
        return torch.device(found.type)
    return torch.device(found.type, found.index or 0)


def place_of(label: torch.device) -> Place:
    """Where the ledger books memory of that device."""
    return {"cpu": "host", "meta": "nowhere"}.get(label.type, "device")  # type: ignore[return-value]


def value_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The true value of a tensor where there is one: a real tensor is its own."""
    if isinstance(tensor, SimTensor):
        return tensor.value
    return None if tensor.device.type == "meta" else tensor


def shape_of(tensor: torch.Tensor) -> torch.Tensor:
    """The meta tensor of its shape."""
    return tensor.meta if isinstance(tensor, SimTensor) else meta_like(tensor)


def meta_like(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor of the same shape, strides and dtype."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def forget_values(func: Any, args: Any, kwargs: Any) -> None:
    """Written from a hollow tensor, a small one no longer knows its value, nor do the views of it."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in tensors_in(given):
                if isinstance(tensor, SimTensor):
                    tensor.block.known = False


def update_shape(tensor: SimTensor, shape: torch.Tensor) -> None:
    """After an operation that changed a shape in place (`unsqueeze_`), the tensor shows the new one."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():
        tensor.as_strided_(shape.shape, shape.stride(), shape.storage_offset())
