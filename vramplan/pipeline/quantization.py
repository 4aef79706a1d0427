"""Recognise quantized weights: their library, their bytes, and the operations they do not allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from vramplan.pipeline.types import Component

if TYPE_CHECKING:
    import torch

# torchao's classes of quantized parameters, and the names of their formats in its settings.
_TORCHAO = {"Int8Tensor": "int8", "Float8Tensor": "float8"}

_SEPARATE_SCALES = "keeps scales outside of its weights, which {} does not move along (diffusers 0.42)"
# `Linear8bitLt` keeps its codes in `state` too, which only its own `to` moves and no module around it calls (0.50);
# diffusers does not move it at all with a bitsandbytes before 0.48.
EIGHT_BIT_STAYS = "quantized to 8 bit by bitsandbytes, whose weights stay on their device when a component is moved"
# The operations that fail for the tensors of a library, or of one of its formats, by the field of `Component` for the
# reason. For any other library only moving whole components is known to work.
_LIMITS: Mapping[str, Mapping[str, str]] = {
    "torchao": {"disk_offload_refusal": "torchao's tensors cannot be written to safetensors files: leave disk out"},
    "bitsandbytes": {
        "group_offload_refusal": f"bitsandbytes {_SEPARATE_SCALES.format('group offloading')}",
        "sequential_offload_refusal": f"bitsandbytes {_SEPARATE_SCALES.format('sequential offloading')}",
    },
    "gguf": {
        "sequential_offload_refusal": "the type of its blocks is lost where accelerate (1.15) moves tensors one by one"
    },
    "bitsandbytes int8": {"move_refusal": EIGHT_BIT_STAYS},
}
_UNKNOWN = {
    "group_offload_refusal": "weights quantized by {} can only be moved whole: group offloading is untested",
    "sequential_offload_refusal": "weights quantized by {} can only be moved whole: sequential offloading is untested",
}


def mark_quantized(component: Component, quantized: str) -> Component:
    """The component with quantized weights: the format, and the reasons against operations it does not allow."""
    if not quantized:
        return component
    library = quantized.partition(" ")[0]
    known = {**_LIMITS.get(library, {}), **_LIMITS.get(quantized, {})}
    limits = known or {field: reason.format(library) for field, reason in _UNKNOWN.items()}
    reasons: dict[str, Any] = {field: f"{component.class_name}: {reason}" for field, reason in limits.items()}
    return replace(component, quantized=quantized, **reasons)


def quantization_of(module: torch.nn.Module) -> str:
    """The most frequent format of the quantized weights, such as `torchao int8`; empty if none is quantized."""
    found = Counter(kind for child in module.modules() for kind in _kinds(child))
    return found.most_common(1)[0][0] if found else ""


def _kinds(module: torch.nn.Module) -> Iterable[str]:
    kind = getattr(module, "quantized", None)
    if isinstance(kind, str):  # a stand-in
        yield kind
        return
    for tensor in module.parameters(recurse=False):
        kind = kind_of(tensor)
        if kind:
            yield kind


def kind_of(tensor: torch.Tensor) -> str:
    """The format of one quantized parameter, empty for a plain one."""
    cls = type(tensor)
    if hasattr(cls, "tensor_data_names"):
        return torchao_kind(cls.__name__, plain=getattr(tensor, "act_quant_kwargs", None) is None)
    if cls.__name__ == "Params4bit":
        return f"bitsandbytes {getattr(tensor, 'quant_type', 'nf4')}"
    if cls.__name__ == "Int8Params":
        return "bitsandbytes int8"
    if cls.__name__ == "GGUFParameter":
        return f"gguf {gguf_type(tensor)}"
    return "quanto" if "quanto" in cls.__module__.split(".") else ""


def torchao_kind(class_name: str, *, plain: bool) -> str:
    """The format of a tensor of this torchao class; `plain` if activations are not quantized."""
    return f"torchao {_TORCHAO[class_name] if plain and class_name in _TORCHAO else class_name}"


def gguf_type(tensor: Any) -> str:
    """ggml's name of the type of a `GGUFParameter`, such as `Q4_K`."""
    return str(tensor.quant_type.name)


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors inside of a wrapper tensor; empty for a plain tensor."""
    names = getattr(type(tensor), "tensor_data_names", ())
    flatten = getattr(tensor, "__tensor_flatten__", None)  # torch's protocol for wrappers, optional tensors included
    return [getattr(tensor, name) for name in (flatten()[0] if flatten is not None else names)]


def element_count(tensor: torch.Tensor) -> int:
    """The number of weights in a parameter: bitsandbytes and GGUF pack several into one element."""
    state = getattr(tensor, "quant_state", None) if type(tensor).__name__ == "Params4bit" else None
    shape = state.shape if state is not None else getattr(tensor, "quant_shape", tensor.shape)
    return prod(shape)


def extra_bytes(tensor: torch.Tensor) -> int:
    """The bytes of the scales that bitsandbytes keeps in attributes of a parameter, 0 for other libraries."""
    if type(tensor).__name__ == "Int8Params":
        return 4 * int(tensor.shape[0])  # SCB, which the first forward moves to the module
    state = getattr(tensor, "quant_state", None) if type(tensor).__name__ == "Params4bit" else None
    return _state_bytes(state) if state is not None else 0


def _state_bytes(state: Any) -> int:
    tensors = (state.absmax, state.code, getattr(state, "offset", None))
    own: int = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
    nested = getattr(state, "state2", None)  # not there without nested scales
    return own + (_state_bytes(nested) if nested is not None else 0)
