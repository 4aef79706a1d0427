"""Intercept torch functions that name a device or read a value, and run them on the simulated devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vramplan.simulator.engine import Engine
from vramplan.simulator.kernels import attention_flops, attention_kind, attention_scratch_bytes, scores_bytes
from vramplan.simulator.shapes import CPU, META, label_of, normalize_device, shape_of, value_of
from vramplan.simulator.tensor import VALUE_LIMIT, SimTensor, map_tensors, tensors_in


class SimulatedDevices(TorchFunctionMode):
    """Context manager: tensors move to and from the simulated devices of one engine."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self.engine, func, *args, **kwargs)
        if kwargs.get("device") is not None:
            return _create_on_device(self.engine, func, args, kwargs)
        return func(*args, **kwargs)


def _create_on_device(engine: Engine, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a function that makes a tensor on a device: `torch.zeros(..., device="cuda")`."""
    target = normalize_device(kwargs["device"])
    rest = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    given = [tensor for tensor in tensors_in((args, rest)) if isinstance(tensor, SimTensor)]
    if given and label_of(given[0]) != target and _is_like(func):
        return _create_like(engine, func, args, rest, target)
    if given:
        made = func(*args, **rest)
        return engine.convert(made, target) if isinstance(made, torch.Tensor) else made
    if target in (CPU, META) or not _makes_tensors(func):
        return func(*args, **kwargs)
    shape = func(*args, **{key: value for key, value in rest.items() if key != "generator"}, device="meta")
    if shape.numel() > VALUE_LIMIT:
        return engine.new(shape, target)
    rest.pop("generator", None)
    return engine.new(shape, target, "activation", func(*args, **rest, device="cpu"))


def _is_like(func: Any) -> bool:
    """Whether the function makes a tensor in the shape or dtype of another one, whose values do not matter."""
    name = getattr(func, "__name__", "")
    return name.endswith("_like") or name.startswith("new_")


def _create_like(engine: Engine, func: Any, args: Any, rest: dict[str, Any], target: torch.device) -> torch.Tensor:
    """Run a function like `torch.empty_like` for another device than that of its argument: nothing is made on that."""

    def standing_in(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)

    with torch._C.DisableTorchFunctionSubclass():
        shape = func(*map_tensors(args, shape_of), **map_tensors(rest, shape_of), device="meta")
        if shape.numel() > VALUE_LIMIT:
            return engine.new(shape, target)
        value = func(*map_tensors(args, standing_in), **map_tensors(rest, standing_in), device="cpu")
    return engine.new(shape, target, value=value.clone())


def _makes_tensors(func: Any) -> bool:
    return getattr(func, "__name__", "") not in ("Generator", "_parse_to")


def _to(engine: Engine, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    copy = bool(kwargs.pop("copy", False))
    other = kwargs.pop("other", None) or (args[0] if args and isinstance(args[0], torch.Tensor) else None)
    if other is not None:
        return engine.convert(tensor, label_of(other), other.dtype, copy=copy)
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    return engine.convert(tensor, device, dtype, copy=copy, memory_format=memory_format)


def _cuda(engine: Engine, func: Any, tensor: torch.Tensor, device: Any = 0, *args: Any, **kwargs: Any) -> Any:
    return engine.convert(tensor, normalize_device(device if device is not None else 0))


def _cpu(engine: Engine, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return engine.convert(tensor, CPU)


def _pin(engine: Engine, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return engine.pin(tensor) if isinstance(tensor, SimTensor) else tensor


def _is_pinned(engine: Engine, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
    return isinstance(tensor, SimTensor) and tensor.block.place == "pinned"


def _set_data(engine: Engine, func: Any, tensor: torch.Tensor, new: torch.Tensor) -> None:
    """`parameter.data = other`: the parameter takes over the shape, device and memory of `other`."""
    if not isinstance(tensor, SimTensor):
        return func(tensor, new)  # type: ignore[no-any-return]
    if not isinstance(new, SimTensor):
        new = engine.from_real(new, CPU, tensor.block.kind)
    if new.dtype != tensor.dtype or new.shape != tensor.shape or new.stride() != tensor.stride():
        func(tensor, new)
    tensor.label, tensor.block, tensor.stored, tensor.meta = new.label, new.block, new.stored, new.meta
    return None


def _numpy(engine: Engine, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(tensor, SimTensor):
        return func(tensor, *args, **kwargs)
    if tensor.value is not None:
        return tensor.value.numpy()
    name = str(tensor.dtype).removeprefix("torch.")
    return np.zeros(tuple(tensor.shape), dtype="float32" if name == "bfloat16" else name)


def _list(engine: Engine, func: Any, tensor: torch.Tensor) -> Any:
    return _numpy(engine, func, tensor).tolist() if isinstance(tensor, SimTensor) else func(tensor)


def _set_item(engine: Engine, func: Any, tensor: torch.Tensor, index: Any, new: Any) -> None:
    """`tensor[index] = new`, on values while all are known: torch would make the number a meta tensor."""
    if isinstance(tensor, SimTensor) and all(value_of(item) is not None for item in tensors_in([tensor, index, new])):
        assert tensor.value is not None
        func(tensor.value, map_tensors(index, value_of), map_tensors(new, value_of))
        return
    func(tensor, index, new)


def _read_number(kind: type) -> Callable[..., Any]:
    def read(engine: Engine, func: Any, tensor: torch.Tensor) -> Any:
        return engine.scalar(tensor, kind) if isinstance(tensor, SimTensor) else func(tensor)

    return read


def _data_ptr(engine: Engine, func: Any, tensor: torch.Tensor) -> int:
    return id(tensor.block) if isinstance(tensor, SimTensor) else int(func(tensor))


def _equal(engine: Engine, func: Any, first: torch.Tensor, second: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
    values = [t.value if isinstance(t, SimTensor) else t for t in (first, second)]
    if any(value is None for value in values):
        engine.note("two unknown tensors were assumed to be equal")
        return True
    return bool(func(*values, *args, **kwargs))


def _tensor(engine: Engine, func: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
    device = kwargs.pop("device", None)
    if isinstance(data, SimTensor):
        made: torch.Tensor = engine.convert(data, data.label, kwargs.get("dtype"), copy=True)
    else:
        # torch accepts a list of tensors only if each has one element
        made = func(map_tensors(data, lambda tensor: tensor.item()) if _nested(data) else data, *args, **kwargs)
    return made if device is None else engine.convert(made, normalize_device(device))


def _new_tensor(engine: Engine, func: Any, like: torch.Tensor, data: Any, *args: Any, **kwargs: Any) -> Any:
    """`like.new_tensor(data)`: a tensor with the device and dtype of `like`."""
    if not isinstance(like, SimTensor):
        return func(like, data, *args, **kwargs)
    options = {"dtype": kwargs.get("dtype") or like.dtype, "device": kwargs.get("device") or like.label}
    return _tensor(engine, torch.tensor, data, **options)


def _nested(data: Any) -> bool:
    return isinstance(data, list | tuple) and any(isinstance(tensor, SimTensor) for tensor in tensors_in(data))


def _attention(
    engine: Engine,
    func: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Attention with the kernel that the device would choose, not the CPU's: a fused kernel has no score matrix."""
    label, kernels = label_of(query), engine.kernels
    if label.type != "cuda":
        return func(query, key, value, attn_mask, *args, **kwargs)
    if str(query.dtype).removeprefix("torch.") in kernels.math_dtypes:
        return _math_attention(query, key, value, attn_mask, *args, **kwargs)
    if query.dim() > 3:  # stored as (batch, length, heads, size), returned transposed
        shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], value.shape[-1])
        result = torch.empty(shape, dtype=query.dtype, device="meta").transpose(-3, -2)
    else:
        result = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device="meta")
    engine.ledger.operation = "scaled_dot_product_attention"
    engine.ledger.operations += 1
    made = engine.new(result, label)
    scores = 0 if kernels.fused_attention else scores_bytes(query, key)
    engine.ledger.transient(scores or attention_scratch_bytes(query, key, attn_mask), "workspace")
    flops, kind = attention_flops(query, key, value), attention_kind(query, attn_mask)
    engine.ledger.count_kernel(flops=flops, traffic_bytes=2 * scores, kind=kind)
    return made


def _math_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch's attention without a fused kernel: in float32, with scores and softmax in memory together."""
    steps = torch.ops.aten._scaled_dot_product_attention_math
    options = {"scale": scale, "enable_gqa": enable_gqa}
    made: torch.Tensor = steps(query, key, value, attn_mask, dropout_p, is_causal, None, **options)[0]
    return made


def _multi_head(engine: Engine, func: Any, *args: Any, **kwargs: Any) -> Any:
    """`nn.MultiheadAttention`: calls inside of a torch function bypass the mode, so attention is patched by name."""
    fused = partial(_attention, engine, functional.scaled_dot_product_attention)
    with patch.object(functional, "scaled_dot_product_attention", fused):
        return func(*args, **kwargs)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    functional.multi_head_attention_forward: _multi_head,
    torch.Tensor.to: _to,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.pin_memory: _pin,
    torch.Tensor.is_pinned: _is_pinned,
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    torch.Tensor.numpy: _numpy,
    torch.Tensor.__array__: _numpy,
    torch.Tensor.tolist: _list,
    torch.Tensor.__setitem__: _set_item,
    torch.Tensor.__bool__: _read_number(bool),
    torch.Tensor.__int__: _read_number(int),
    torch.Tensor.__float__: _read_number(float),
    torch.Tensor.__index__: _read_number(int),
    torch.Tensor.data_ptr: _data_ptr,
    torch.equal: _equal,
    torch.Tensor.equal: _equal,
    torch.allclose: _equal,
    torch.tensor: _tensor,
    torch.as_tensor: _tensor,
    torch.Tensor.new_tensor: _new_tensor,
    torch.nn.functional.scaled_dot_product_attention: _attention,
}
