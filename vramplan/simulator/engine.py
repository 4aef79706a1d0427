"""Run operations on simulated tensors: shapes from meta kernels, small values on the CPU, memory in the ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from vramplan.simulator.kernels import Kernels
from vramplan.simulator.ledger import Block, Kind, Ledger, Place
from vramplan.simulator.tensor import VALUE_LIMIT, SimTensor, make, mapped, storage_key, tensors_in

aten = torch.ops.aten
CPU = torch.device("cpu")
META = torch.device("meta")

# Copies that may go from one device to another, and indexing, which takes indices from the CPU.
_CROSS_DEVICE = {aten.copy_, aten._to_copy, aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}
# A copy of a weight is a weight wherever it goes.
_KEEPS_KIND = {aten._to_copy, aten.clone, aten.detach, aten.alias}


class Engine:
    """One simulation's rules and books. `notes` tells what had to be assumed about hollow values."""

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
        """A tensor of its own memory, with the shape of a meta tensor."""
        size = shape.untyped_storage().nbytes()
        if value is not None and value.numel() > VALUE_LIMIT:
            value = None
        return make(self, shape, label, Block(self.ledger, size, _place(label), kind, owner), value)

    def from_real(self, tensor: torch.Tensor, label: torch.device, kind: Kind = "activation") -> SimTensor:
        """A real CPU tensor on a simulated device, with its value while it is small."""
        value = tensor.detach().clone() if tensor.numel() <= VALUE_LIMIT and tensor.device.type == "cpu" else None
        return self.new(_meta_like(tensor), label, kind, value)

    def convert(
        self,
        tensor: torch.Tensor,
        label: torch.device | None,
        dtype: torch.dtype | None = None,
        *,
        copy: bool = False,
        memory_format: torch.memory_format | None = None,
    ) -> torch.Tensor:
        """`tensor.to(...)`: itself where nothing changes, else new memory where it would be."""
        here = label_of(tensor)
        target, kind_of = normalized(label or here), dtype or tensor.dtype
        format_same = memory_format in (None, torch.preserve_format) or (
            tensor.dim() in (4, 5) and tensor.is_contiguous(memory_format=memory_format)
        )
        if target == here and kind_of == tensor.dtype and not copy and format_same:
            return tensor
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
            self.ledger.count_kernel(traffic_bytes=_traffic((tensor,), made))
        return made

    def copy(self, tensor: SimTensor) -> SimTensor:
        """A copy in memory of its own, on the same device."""
        made = self.convert(tensor, tensor.label, copy=True)
        assert isinstance(made, SimTensor)
        return made

    def pinned(self, tensor: SimTensor) -> SimTensor:
        """A page-locked copy: torch's host allocator rounds it up to a power of two."""
        from vramplan.pipeline.geometry import power_of_two

        shape = torch.empty_like(tensor.meta)
        size = power_of_two(shape.untyped_storage().nbytes())
        block = Block(self.ledger, size, "pinned", tensor.block.kind, tensor.block.owner)
        return make(self, shape, CPU, block, tensor.value)

    # ---- running operations

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The result of one ATen operation."""
        ledger = self.ledger
        packet = func.overloadpacket
        ledger.operations += 1
        ledger.operation = str(packet)
        tensors = list(tensors_in((args, kwargs)))
        label = self._label(packet, tensors)
        special = _SPECIAL.get(packet)
        if special is not None:
            result = special(self, func, args, kwargs, tensors, label)
            if result is not NotImplemented:
                return result
        values = [value_of(tensor) for tensor in tensors]
        if all(value is not None for value in values):
            computed = self._run_on_values(func, args, kwargs, tensors, label)
            if computed is not NotImplemented:
                self._count(func, args, kwargs, computed, label)
                return computed
        return self._run_on_shapes(func, args, kwargs, tensors, label)

    def _run_on_values(
        self, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: torch.device
    ) -> Any:
        by_value = {id(value): tensor for tensor in tensors if (value := value_of(tensor)) is not None}
        try:
            with torch._C.DisableTorchFunctionSubclass():
                results = func(*mapped(args, value_of), **mapped(kwargs, value_of))
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
                    return make(self, _meta_like(result), label, tensor.block, result)
            return self.new(_meta_like(result), label, self._kind(func, tensors), result)

        return mapped(results, wrapped)

    def _run_on_shapes(
        self, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: torch.device
    ) -> Any:
        shapes = {id(tensor): _shape_of(tensor) for tensor in tensors}
        with torch._C.DisableTorchFunctionSubclass():
            results = _pointwise(func.overloadpacket, [shapes[id(tensor)] for tensor in tensors])
            if results is None:
                results = func(*mapped(args, lambda t: shapes[id(t)]), **mapped(kwargs, lambda t: shapes[id(t)]))
        if func._schema.is_mutable:
            _forget_values(func, args, kwargs)
        by_key = {storage_key(t.meta): t for t in tensors if isinstance(t, SimTensor)}
        kind = self._kind(func, tensors)

        def wrapped(result: torch.Tensor) -> torch.Tensor:
            for tensor in tensors:
                if shapes[id(tensor)] is result:
                    if isinstance(tensor, SimTensor) and tensor.shape != result.shape:
                        _follow(tensor, result)
                    return tensor
            source = by_key.get(storage_key(result))
            if source is not None:
                return make(self, result, label, source.block)
            return self.new(result, label, kind)

        made = mapped(results, wrapped)
        self._count(func, args, kwargs, made, label)
        return made

    def _count(self, func: Any, args: Any, kwargs: Any, made: Any, label: torch.device) -> None:
        """What the device's kernel would compute, or read and write, and the memory it would use beside its result."""
        if label.type != "cuda" or func.is_view:
            return
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.ledger.count_kernel(flops=formula(*args, **kwargs, out_val=made))
        else:
            self.ledger.count_kernel(traffic_bytes=_traffic(args, made))
        self.kernels.after(self.ledger, func.overloadpacket, args, made)

    def _label(self, packet: Any, tensors: Sequence[torch.Tensor]) -> torch.device:
        """The device the result is on. Raises RuntimeError, as torch does, where the arguments are on two."""
        # torch's own composite operations make plain meta tensors beside ours: those are wherever ours are
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
            self.ledger.moved(source.type, target.type, made.block.size)

    # ---- values

    def scalar(self, tensor: SimTensor, kind: type) -> Any:
        """The Python number in a tensor; 0 with a note where it is hollow."""
        value = tensor.value
        if value is not None:
            return kind(value.item())
        where = self.ledger.module or self.ledger.component
        self.note(f"a value was needed where there is none ({where or 'the pipeline'}): 0 was assumed")
        return kind(0)

    def note(self, text: str) -> None:
        """Record an assumption, which names its place: what made it is not played back for another one."""
        for recorder in self.ledger.recorders:
            recorder.broken = True
        self.notes[text] = self.notes.get(text, 0) + 1


# Operations whose result is like their largest argument, where all agree in dtype: torch's own meta functions
# for these are written in Python and would take most of a simulation's time.
_POINTWISE = frozenset(
    getattr(aten, name)
    for name in (
        *("add", "sub", "mul", "div", "silu", "gelu", "relu", "sigmoid", "tanh", "exp", "neg", "sqrt", "rsqrt"),
        *("sin", "cos", "clamp", "abs"),
    )
)


def _traffic(args: Any, made: Any) -> int:
    """Bytes of every tensor read and written."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in((args, made)))


def _pointwise(packet: Any, shapes: Sequence[torch.Tensor]) -> torch.Tensor | None:
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
        if shape.dtype != largest.dtype or not _fits_in(shape.shape, largest.shape):
            return None
    return torch.empty_like(largest)


def _fits_in(small: Sequence[int], large: Sequence[int]) -> bool:
    """Whether a shape broadcasts to the other one and leaves it as it is."""
    return all(size in (1, full) for size, full in zip(reversed(small), reversed(large), strict=False))


def label_of(tensor: torch.Tensor) -> torch.device:
    """The device a tensor is, or would be, on."""
    return tensor.label if isinstance(tensor, SimTensor) else tensor.device


def normalized(device: torch.device | str | int) -> torch.device:
    """With its index: `cuda` is `cuda:0`; the CPU has none."""
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type in ("cpu", "meta"):
        return torch.device(found.type)
    return torch.device(found.type, found.index or 0)


def _place(label: torch.device) -> Place:
    return {"cpu": "host", "meta": "nowhere"}.get(label.type, "device")  # type: ignore[return-value]


def value_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The true value of a tensor where there is one: a real tensor is its own."""
    if isinstance(tensor, SimTensor):
        return tensor.value
    return None if tensor.device.type == "meta" else tensor


def _shape_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.meta if isinstance(tensor, SimTensor) else _meta_like(tensor)


def _meta_like(tensor: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _forget_values(func: Any, args: Any, kwargs: Any) -> None:
    """Written from a hollow tensor, a small one no longer knows its value, nor do the views of it."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in tensors_in(given):
                if isinstance(tensor, SimTensor):
                    tensor.block.known = False


def _follow(tensor: SimTensor, shape: torch.Tensor) -> None:
    """After an operation that changed a shape in place (`unsqueeze_`), the tensor shows the new one."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():
        tensor.as_strided_(shape.shape, shape.stride(), shape.storage_offset())


# ---- operations that need more than a shape

Special = Callable[[Engine, Any, Any, Any, Sequence[torch.Tensor], torch.device], Any]


def _item(engine: Engine, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: Any) -> Any:
    tensor = args[0]
    kind = bool if tensor.dtype == torch.bool else float if tensor.dtype.is_floating_point else int
    return engine.scalar(tensor, kind)


def _nonzero(engine: Engine, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: Any) -> Any:
    tensor = args[0]
    if isinstance(tensor, SimTensor) and tensor.value is not None:
        return NotImplemented
    engine.note("a mask without values was taken to select everything")
    shape = torch.empty((tensor.numel(), tensor.dim()), dtype=torch.int64, device="meta")
    return engine.new(shape, label)


def _index(engine: Engine, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: Any) -> Any:
    """Boolean masks become as many indices as they select, so that the shape is known."""
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
            engine.note("a mask without values was taken to select everything")
        count = mask.numel() if value is None else int(value.sum())
        picked = torch.empty((count,), dtype=torch.int64, device="meta")
        indices += [engine.new(picked, label) for _ in range(mask.dim())]
    return engine._run_on_shapes(
        func, (args[0], indices, *args[2:]), kwargs, list(tensors_in((args[0], indices, args[2:]))), label
    )


def _bincount(engine: Engine, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: Any) -> Any:
    """How often each number is there: a router's tokens, say, all of which then go to the first expert."""
    if all(value_of(tensor) is not None for tensor in tensors):
        return NotImplemented
    engine.note("numbers without values were taken to be all 0 when they were counted")
    counts = torch.zeros(max(1, kwargs.get("minlength", args[2] if len(args) > 2 else 0)), dtype=torch.int64)
    counts[0] = args[0].numel()
    return engine.new(_meta_like(counts), label, "activation", counts)


def _masked_select(
    engine: Engine, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: Any
) -> Any:
    mask = value_of(args[1])
    if all(value_of(tensor) is not None for tensor in tensors):
        return NotImplemented
    if mask is None:
        engine.note("a mask without values was taken to select everything")
    shape = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
    count = math.prod(shape) if mask is None else int(mask.expand(shape).sum())
    return engine.new(torch.empty((count,), dtype=args[0].dtype, device="meta"), label)


def _unique(engine: Engine, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: Any) -> Any:
    """Values, where each of them came from, and counts."""
    if value_of(args[0]) is not None:
        return NotImplemented
    engine.note("numbers without values were taken to be all different")
    count = args[0].numel()
    values = torch.empty((count,), dtype=args[0].dtype, device="meta")
    inverse, counts = (torch.empty(s, dtype=torch.int64, device="meta") for s in (args[0].shape, (count,)))
    return tuple(engine.new(made, label) for made in (values, inverse, counts))


def _to_copy(engine: Engine, func: Any, args: Any, kwargs: Any, tensors: Sequence[torch.Tensor], label: Any) -> Any:
    device = kwargs.get("device")
    return engine.convert(
        args[0],
        None if device is None or torch.device(device) == META else device,
        kwargs.get("dtype"),
        copy=True,
        memory_format=kwargs.get("memory_format"),
    )


_SPECIAL: dict[Any, Special] = {
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
