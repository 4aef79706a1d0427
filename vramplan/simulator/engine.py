"""Run operations on simulated tensors: shapes from meta kernels, small values on the CPU, memory in the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from vramplan.simulator.data_dependent import HANDLERS
from vramplan.simulator.kernels import Kernels, product_kind
from vramplan.simulator.ledger import Block, Kind, Ledger
from vramplan.simulator.shape_inference import infer_results
from vramplan.simulator.shapes import (
    CPU,
    aten,
    bytes_touched,
    forget_values,
    label_of,
    meta_like,
    normalize_device,
    place_of,
    pointwise_result,
    shape_of,
    update_shape,
    value_of,
)
from vramplan.simulator.tensor import VALUE_LIMIT, SimTensor, make_tensor, map_tensors, storage_key, tensors_in

# Operations that accept tensors on two devices: copies, and indexing with indices on the CPU.
_CROSS_DEVICE = {aten.copy_, aten._to_copy, aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}
# Operations whose result keeps the kind of memory of their argument: a copy of a weight is a weight.
_KEEPS_KIND = {aten._to_copy, aten.clone, aten.detach, aten.alias}


class Engine:
    """Runs the operations of one simulation. `notes` counts the assumptions made about unknown values."""

    def __init__(self, ledger: Ledger, kernels: Kernels) -> None:
        self.ledger = ledger
        self.kernels = kernels
        self.notes: dict[str, int] = {}

    # ---- making tensors

    def new(
        self,
        shape: torch.Tensor,
        label: torch.device,
        kind: Kind = "activation",
        value: torch.Tensor | None = None,
        owner: str = "",
    ) -> SimTensor:
        """A tensor with memory of its own, in the shape of the meta tensor `shape`."""
        size = shape.untyped_storage().nbytes()
        if value is not None and value.numel() > VALUE_LIMIT:
            value = None
        return make_tensor(self, shape, label, Block(self.ledger, size, place_of(label), kind, owner), value)

    def from_real(self, tensor: torch.Tensor, label: torch.device, kind: Kind = "activation") -> SimTensor:
        """A copy of a real CPU tensor on a simulated device, with its value if it is small."""
        value = tensor.detach().clone() if tensor.numel() <= VALUE_LIMIT and tensor.device.type == "cpu" else None
        return self.new(meta_like(tensor), label, kind, value)

    def convert(
        self,
        tensor: torch.Tensor,
        label: torch.device | None,
        dtype: torch.dtype | None = None,
        *,
        copy: bool = False,
        memory_format: torch.memory_format | None = None,
    ) -> torch.Tensor:
        """`tensor.to(...)`: the tensor itself if nothing changes, else a new one on the target device."""
        here = label_of(tensor)
        target, kind_of = normalize_device(label or here), dtype or tensor.dtype
        format_same = memory_format in (None, torch.preserve_format) or (
            tensor.dim() in (4, 5) and tensor.is_contiguous(memory_format=memory_format)
        )
        if target == here and kind_of == tensor.dtype and not copy and format_same:
            self.ledger.note_read(tensor)
            return tensor
        if here.type == "meta" != target.type and isinstance(tensor, SimTensor):
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        if not isinstance(tensor, SimTensor):
            if target in (CPU, here):
                with torch._C.DisableTorchFunctionSubclass():
                    return torch.Tensor.to(tensor, dtype=kind_of, copy=copy)
            made = self.from_real(tensor if kind_of == tensor.dtype else torch.Tensor.to(tensor, kind_of), target)
            self._count_move(here, target, made)
            return made
        with torch._C.DisableTorchFunctionSubclass():
            shape = torch.empty_like(tensor.meta, dtype=kind_of, memory_format=memory_format or torch.preserve_format)
        value = tensor.value
        value = None if value is None else value.to(kind_of, copy=True)
        made = self.new(shape, target, tensor.block.kind, value, tensor.block.owner)
        self._count_move(here, target, made)
        if target == here and target.type == "cuda":
            self.ledger.count_kernel(traffic_bytes=bytes_touched((tensor,), made))
        return made

    def copy(self, tensor: SimTensor) -> SimTensor:
        """A copy with memory of its own, on the same device."""
        made = self.convert(tensor, tensor.label, copy=True)
        assert isinstance(made, SimTensor)
        return made

    def pin(self, tensor: SimTensor) -> SimTensor:
        """A page-locked copy. torch's host allocator rounds its size up to a power of two."""
        from vramplan.pipeline.geometry import power_of_two

        shape = torch.empty_like(tensor.meta)
        size = power_of_two(shape.untyped_storage().nbytes())
        block = Block(self.ledger, size, "pinned", tensor.block.kind, tensor.block.owner)
        return make_tensor(self, shape, CPU, block, tensor.value)

    # ---- running operations

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one ATen operation and return its result."""
        ledger = self.ledger
        packet = func.overloadpacket
        ledger.operations += 1
        ledger.operation = str(packet)
        tensors = list(tensors_in((args, kwargs)))
        label = self._label(packet, tensors)
        handler = HANDLERS.get(packet)
        if handler is not None:
            result = handler(self, func, args, kwargs, tensors, label)
            if result is not NotImplemented:
                return result
        values = [value_of(tensor) for tensor in tensors]
        if all(value is not None for value in values):
            computed = self._run_on_values(func, args, kwargs, tensors, label)
            if computed is not NotImplemented:
                self._count(func, args, kwargs, computed, label)
                return computed
        return self.run_on_shapes(func, args, kwargs, tensors, label)

    def _run_on_values(
        self, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: torch.device
    ) -> Any:
        by_value = {id(value): tensor for tensor in tensors if (value := value_of(tensor)) is not None}
        try:
            with torch._C.DisableTorchFunctionSubclass():
                results = func(*map_tensors(args, value_of), **map_tensors(kwargs, value_of))
        except (NotImplementedError, RuntimeError) as error:
            if "not implemented" not in str(error):
                raise
            return NotImplemented

        def wrapped(result: torch.Tensor) -> torch.Tensor:
            if id(result) in by_value:
                return by_value[id(result)]
            key = result.untyped_storage()._cdata
            for tensor in by_value.values():
                source = value_of(tensor)
                assert source is not None
                if source.untyped_storage()._cdata == key and isinstance(tensor, SimTensor):
                    return make_tensor(self, meta_like(result), label, tensor.block, result)
            return self.new(meta_like(result), label, self._kind(func, tensors), result)

        return map_tensors(results, wrapped)

    def run_on_shapes(
        self, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: torch.device
    ) -> Any:
        """Run an operation without values: torch's meta kernels give the shape of the result."""
        shapes = {id(tensor): shape_of(tensor) for tensor in tensors}
        with torch._C.DisableTorchFunctionSubclass():
            results = pointwise_result(func.overloadpacket, [shapes[id(tensor)] for tensor in tensors])
            if results is None:
                results = infer_results(func, args, kwargs, shapes, partial(_run_meta, func, args, kwargs, shapes))
        if func._schema.is_mutable:
            forget_values(func, args, kwargs)
        by_key = {storage_key(t.meta): t for t in tensors if isinstance(t, SimTensor)}
        kind = self._kind(func, tensors)

        def wrapped(result: torch.Tensor) -> torch.Tensor:
            for tensor in tensors:
                if shapes[id(tensor)] is result:
                    if isinstance(tensor, SimTensor) and tensor.shape != result.shape:
                        update_shape(tensor, result)
                    return tensor
            source = by_key.get(storage_key(result))
            if source is not None:
                return make_tensor(self, result, label, source.block)
            return self.new(result, label, kind)

        made = map_tensors(results, wrapped)
        self._count(func, args, kwargs, made, label)
        return made

    def _count(self, func: Any, args: Any, kwargs: Any, made: Any, label: torch.device) -> None:
        """Count the kernel's floating-point operations, or else its traffic, and its workspace."""
        if label.type != "cuda" or func.is_view:
            return
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=made)
            self.ledger.count_kernel(flops=flops, kind=product_kind(func.overloadpacket, args[0]))
        else:
            self.ledger.count_kernel(traffic_bytes=bytes_touched(args, made))
        self.kernels.count_workspace(self.ledger, func.overloadpacket, args, made)

    def _label(self, packet: Any, tensors: Sequence[torch.Tensor]) -> torch.device:
        """The device of the result. Raises RuntimeError, as torch does, if the arguments are on two devices."""
        # torch's composite operations mix plain meta tensors with simulated ones: these decide the device
        labels = {label_of(t) for t in tensors if t.dim() > 0 and (isinstance(t, SimTensor) or not t.is_meta)}
        if not labels:
            return next((label_of(t) for t in tensors if label_of(t) != CPU), CPU)
        if len(labels) > 1 and packet not in _CROSS_DEVICE:
            names = " and ".join(sorted(map(str, labels)))
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two: {names} ({packet})"
            )
        if packet in _CROSS_DEVICE:
            return label_of(tensors[0])
        return next(iter(labels))

    def _kind(self, func: Any, tensors: Sequence[torch.Tensor]) -> Kind:
        first = tensors[0] if tensors else None
        if func.overloadpacket in _KEEPS_KIND and isinstance(first, SimTensor):
            return first.block.kind
        return "activation"

    def _count_move(self, source: torch.device, target: torch.device, made: SimTensor) -> None:
        if source.type != target.type and "meta" not in (source.type, target.type):
            self.ledger.count_transfer(source.type, target.type, made.block.size)

    # ---- values

    def scalar(self, tensor: SimTensor, kind: type) -> Any:
        """The Python number in a tensor; 0, with a note, if its value is unknown."""
        value = tensor.value
        if value is not None:
            return kind(value.item())
        where = self.ledger.module or self.ledger.component
        self.note(f"{where or 'the pipeline'} needs a value that is not known: 0 was assumed")
        return kind(0)

    def note(self, text: str) -> None:
        """Record an assumption. The running forwards cannot be replayed, as the text names the module."""
        for recorder in self.ledger.recorders:
            recorder.broken = True
        self.notes[text] = self.notes.get(text, 0) + 1


def _run_meta(func: Any, args: Any, kwargs: Any, shapes: Mapping[int, torch.Tensor]) -> Any:
    """Run torch's meta kernel on the meta tensors that stand for the arguments."""
    return func(*map_tensors(args, lambda t: shapes[id(t)]), **map_tensors(kwargs, lambda t: shapes[id(t)]))
