"""Give a weightless component the dtypes that `from_pretrained` would."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vramplan.errors import UsageError

if TYPE_CHECKING:
    import torch

# torch's dtype names by those in safetensors headers.
SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}

LOAD_DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}


def load_dtype(name: str) -> str:
    """The torch name of a dtype for loading a pipeline: `bf16` is `bfloat16`.

    Raises:
        UsageError: not one of float32, float16, bfloat16 or their short forms.
    """
    try:
        return LOAD_DTYPES[name.lower().removeprefix("torch.")]
    except KeyError:
        raise UsageError(f"dtype {name!r} is not one of float32, float16, bfloat16") from None


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype with this name."""
    import torch

    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def cast_as_loaded(module: torch.nn.Module, dtype: str) -> None:
    """Cast a weightless module in place to the dtypes it would have after loading its checkpoint with `dtype`.

    Floating parameters and persistent buffers take the dtype, except those that its class keeps in float32:
    diffusers' `_keep_in_fp32_modules` by whole name parts (0.42, `load_model_dict_into_meta`),
    transformers' dtype plan by search (5.23, `_get_dtype_plan`; T5's `wo` in float16). Buffers that are
    not saved keep the dtype the class gave them.
    """
    target = torch_dtype(dtype)
    keeps_float32 = _float32_rule(module, target)
    unsaved = _unsaved_buffers(module)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and name not in unsaved:
            tensor.data = tensor.data.to(torch_dtype("float32") if keeps_float32(name) else target)


def _float32_rule(module: torch.nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    plan = getattr(module, "_get_dtype_plan", None)
    if plan is not None:
        patterns = tuple(plan(dtype))
        return lambda name: any(pattern in name for pattern in patterns)
    kept = frozenset(getattr(module, "_keep_in_fp32_modules", None) or ())
    return lambda name: not kept.isdisjoint(name.split("."))


def _unsaved_buffers(module: torch.nn.Module) -> frozenset[str]:
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules()
        for name in child._non_persistent_buffers_set
    )
