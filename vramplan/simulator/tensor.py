"""Tensors without data on a simulated device.

A `SimTensor` wraps a meta tensor, `meta`, and reports another device: PyTorch computes shapes, dtypes and strides as
for any meta tensor. This class adds the device it would be on, the memory it would hold (a `Block` of the ledger,
shared by views), and, if it is small, its true value, computed on the CPU with the same operation. Large tensors have
no value. No device type is registered and torch is not patched: outside of a simulation these are ordinary objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from vramplan.simulator.ledger import Block, Kind

# Tensors up to this many elements carry their value: timesteps, token ids, masks, small latents.
VALUE_LIMIT = 1 << 18


class Runner(Protocol):
    """Runs the operations of simulated tensors: the part of `Engine` that they and `data_dependent` use."""

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one ATen operation and return its result."""

    def run_on_shapes(
        self, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: torch.device
    ) -> Any:
        """Run one ATen operation on shapes alone."""

    def new(
        self,
        shape: torch.Tensor,
        label: torch.device,
        kind: Kind = "activation",
        value: torch.Tensor | None = None,
        owner: str = "",
    ) -> SimTensor:
        """A tensor with memory of its own, in the shape of the meta tensor `shape`."""

    def convert(
        self,
        tensor: torch.Tensor,
        label: torch.device | None,
        dtype: torch.dtype | None = None,
        *,
        copy: bool = False,
        memory_format: torch.memory_format | None = None,
    ) -> torch.Tensor:
        """`tensor.to(...)`."""

    def copy(self, tensor: SimTensor) -> SimTensor:
        """A copy on the same device."""

    def scalar(self, tensor: SimTensor, kind: type) -> Any:
        """The Python number in a tensor."""

    def note(self, text: str) -> None:
        """Record an assumption."""


class SimTensor(torch.Tensor):
    """A tensor of a simulation, made by `make_tensor`. Its constructor is for code that copies a parameter's type."""

    label: torch.device
    block: Block
    stored: torch.Tensor | None
    meta: torch.Tensor
    engine: Runner
    _is_param: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data: SimTensor, requires_grad: bool = False, **_: Any) -> SimTensor:
        """An alias of `data` in the same memory: accelerate rebuilds parameters as `type(parameter)(value, ...)`."""
        alias = make_tensor(data.engine, data.meta, data.label, data.block, data.stored)
        alias._is_param = True
        return alias

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        engine = next(tensor.engine for tensor in tensors_in((args, kwargs)) if isinstance(tensor, SimTensor))
        with torch._C.DisableTorchFunction():  # the engine names no simulated devices to torch
            return engine.run(func, args, kwargs)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The simulated device of the tensor."""
        return self.label

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """Whether the simulated device is a CUDA device."""
        return self.label.type == "cuda"

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        """Whether the tensor is in simulated host memory."""
        return self.label.type == "cpu"

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        """Whether the tensor is on the meta device, without memory."""
        return self.label.type == "meta"

    @property
    def value(self) -> torch.Tensor | None:
        """The true value, None if the tensor is large or was overwritten by an unknown one."""
        return self.stored if self.block.known else None

    def record_stream(self, stream: Any) -> None:
        """Keep the memory alive for the stream. Defined here, not in the mode, as torch checks the type first."""
        stream.record(self.block)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SimTensor({tuple(self.shape)}, {self.dtype}, {self.label})"

    def __deepcopy__(self, memo: dict[int, Any]) -> SimTensor:
        copy = self.engine.copy(self)
        if getattr(self, "_is_param", False):
            copy._is_param = True
        memo[id(self)] = copy
        return copy


def make_tensor(
    engine: Runner, shape: torch.Tensor, label: torch.device, block: Block, value: torch.Tensor | None = None
) -> SimTensor:
    """A tensor that shares the storage of the meta tensor `shape` and the given block."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():
        made = torch.Tensor._make_subclass(SimTensor, shape)
    made.engine = engine
    made.label = label
    made.block = block
    made.stored = value
    made.meta = shape
    return made


def storage_key(shape: torch.Tensor) -> int:
    """A key shared by all views of one meta storage, valid while the meta tensor lives."""
    return int(shape.untyped_storage()._cdata)


def tensors_in(arguments: Any) -> Iterable[torch.Tensor]:
    """Every tensor in nested tuples, lists and dictionaries of arguments."""
    if isinstance(arguments, torch.Tensor):
        yield arguments
    elif isinstance(arguments, tuple | list):
        for item in arguments:
            yield from tensors_in(item)
    elif isinstance(arguments, dict):
        for item in arguments.values():
            yield from tensors_in(item)


def map_tensors(arguments: Any, change: Any) -> Any:
    """The same nesting with every tensor replaced by `change(tensor)`."""
    if isinstance(arguments, torch.Tensor):
        return change(arguments)
    if isinstance(arguments, tuple | list):
        return (
            type(arguments)(map_tensors(item, change) for item in arguments)
            if not hasattr(arguments, "_fields")
            else type(arguments)(*(map_tensors(item, change) for item in arguments))
        )
    if isinstance(arguments, dict):
        return {key: map_tensors(item, change) for key, item in arguments.items()}
    return arguments
