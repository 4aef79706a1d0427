"""Stand-ins for quantized linear layers, without data: the tensors they hold, and the operations of a forward.

Each one repeats the library's own forward on an accelerator, operation by operation, so that a simulation counts the
packed weights all the time, and the unpacked copy while it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from vramplan.pipeline.geometry import tensor_bytes
from vramplan.pipeline.quantization import gguf_type, kind_of

# bitsandbytes quantizes 4-bit weights in blocks of 64, each with a scale, and keeps a table of their 16 values
# (0.50, `functional.quantize_4bit`).
_BLOCK, _VALUES = 64, 16
# Tensors that bitsandbytes keeps outside of a module's parameters, so that its dtype is that of the other ones.
_NO_PARAMETERS = ("absmax", "quant_map", "SCB")
# The threshold above which LLM.int8() keeps activations as they are (transformers' and diffusers' BitsAndBytesConfig).
_OUTLIER_THRESHOLD = 6.0

Layout = Mapping[str, tuple[int, torch.dtype]]


class PackedLinear(torch.nn.Linear):
    """A linear layer with a packed weight. `quantized` names library and format, as in `Component.quantized`."""

    quantized: str
    packed: torch.nn.Parameter
    scale: torch.nn.Parameter

    def __init__(self, linear: torch.nn.Linear) -> None:
        """Replace `linear`, whose weight and bias are on one device."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, (count, dtype) in self.layout(linear.weight).items():
            made = _parameter_like(linear.weight, count, dtype)
            if name in _NO_PARAMETERS:
                self.register_buffer(name, made.detach())
            else:
                self.register_parameter(name, made)
        self.bias = linear.bias
        self.train(linear.training)

    def layout(self, weight: torch.Tensor) -> Layout:
        """The tensors stored in place of this weight, by name: number of elements and dtype."""
        raise NotImplementedError

    def same_kind(self, linear: torch.nn.Linear) -> PackedLinear:
        """Pack another plain layer in the same way."""
        return type(self)(linear)

    @property
    def kind(self) -> str:
        """A key shared by layers that have equal costs at equal size."""
        return self.quantized


class TorchaoInt8(PackedLinear):
    """`torchao.quantization.Int8Tensor`, by row (0.18): the weight is cast, multiplied, and the product scaled.

    Its `weight` reports the dtype it had before, as torchao's does.
    """

    quantized = "torchao int8"

    def layout(self, weight: torch.Tensor) -> Layout:
        """One byte per weight; a scale and a zero point for each row."""
        return {
            "weight": (0, weight.dtype),
            "packed": (weight.numel(), torch.int8),
            "scale": (self.out_features, torch.float32),
            "zero_point": (self.out_features, torch.int8),
        }

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Run `Int8Tensor`'s weight-only `linear`."""
        codes = self.packed.view(self.out_features, self.in_features).t()
        product = torch.mm(input.reshape(-1, self.in_features), codes.to(input.dtype))
        made = (product * self.scale.to(product.dtype)).reshape(*input.shape[:-1], self.out_features)
        if self.bias is not None:
            made += self.bias
        return made


class TorchaoFloat8(PackedLinear):
    """`torchao.quantization.Float8Tensor`, by row (0.18): the weight is unpacked through float32."""

    quantized = "torchao float8"

    def layout(self, weight: torch.Tensor) -> Layout:
        """One byte per weight, and a scale for each row."""
        return {
            "weight": (0, weight.dtype),
            "packed": (weight.numel(), torch.float8_e4m3fn),
            "scale": (self.out_features, torch.float32),
        }

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Run `Float8Tensor`'s weight-only `linear`."""
        made = torch.matmul(input, self._unpack(self.weight.dtype))
        return made if self.bias is None else made + self.bias

    def _unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """Unpack the weight. Both float32 copies stay until the end, as in torchao's `_dequantize_affine_float8`."""
        wide = self.packed.view(self.out_features, self.in_features).t().to(torch.float32)
        scaled = wide * self.scale
        return scaled.to(dtype)


class BitsandbytesNf4(PackedLinear):
    """`bitsandbytes.nn.Linear4bit` (0.50): unpacked whole, then multiplied.

    bitsandbytes multiplies few rows without unpacking, by a rule that depends on the card; the copy is counted anyway.
    """

    quantized = "bitsandbytes nf4"

    def layout(self, weight: torch.Tensor) -> Layout:
        """Half a byte per weight, a scale for each block, and the table of values."""
        return {
            "weight": ((weight.numel() + 1) // 2, torch.uint8),
            "absmax": (-(-weight.numel() // _BLOCK), torch.float32),
            "quant_map": (_VALUES, torch.float32),
        }

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Run `Linear4bit.forward`."""
        pairs = self.weight.unsqueeze(1).expand(-1, 2)
        unpacked = pairs.to(input.dtype, memory_format=torch.contiguous_format).view(-1)
        unpacked = unpacked[: self.out_features * self.in_features].view(self.out_features, self.in_features)
        return functional.linear(input, unpacked, None if self.bias is None else self.bias.to(input.dtype))


class BitsandbytesInt8(PackedLinear):
    """`bitsandbytes.nn.Linear8bitLt` (0.50): activations are quantized too, and the product has 32 bits at first."""

    quantized = "bitsandbytes int8"

    def layout(self, weight: torch.Tensor) -> Layout:
        """One byte per weight, and a scale for each row."""
        return {"weight": (weight.numel(), torch.int8), "SCB": (self.out_features, torch.float32)}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Run `MatMul8bitLt.forward` without outliers, which are few."""
        rows = input.reshape(-1, self.in_features)
        codes = self._quantize(rows.to(torch.float16))
        product = input.new_empty((len(rows), self.out_features), dtype=torch.int32)
        made = product.to(torch.float16)
        if self.bias is not None:
            made += self.bias.to(torch.float16)
        del codes
        return made.to(input.dtype).reshape(*input.shape[:-1], self.out_features)

    def _quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stats, codes = rows[:, 0].to(torch.float32), rows.to(torch.int8)
        _ = rows.abs() >= _OUTLIER_THRESHOLD
        return codes, stats


class GgufLinear(PackedLinear):
    """`GGUFLinear` of diffusers (0.42): unpacked whole, by diffusers' own functions on tensors without data.

    The optional CUDA kernels (`DIFFUSERS_GGUF_CUDA_KERNELS`) need less memory; they are not modelled.
    """

    def __init__(self, linear: torch.nn.Linear, quant_type: str) -> None:
        """Replace `linear` and compute in its dtype. `quant_type` is ggml's name of the block type, such as `Q4_K`."""
        self.quant_type, self.compute_dtype = quant_type, linear.weight.dtype
        self.quantized = f"gguf {quant_type}"
        super().__init__(linear)

    def layout(self, weight: torch.Tensor) -> Layout:
        """The blocks in the form they have in the file."""
        _, block, size = _ggml(self.quant_type)
        return {"weight": (weight.numel() // block * size, torch.uint8)}

    def same_kind(self, linear: torch.nn.Linear) -> PackedLinear:
        """Pack another plain layer in blocks of the same type."""
        return GgufLinear(linear, self.quant_type)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Run `GGUFLinear.forward_native`."""
        weight = self._unpack()
        weight = weight.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return functional.linear(input, weight, bias)

    def _unpack(self) -> torch.Tensor:
        unpack, block, size = _ggml(self.quant_type)
        made: torch.Tensor = unpack(self.weight.reshape(-1, size), block, size)
        return made.reshape(self.out_features, self.in_features)


def _ggml(quant_type: str) -> tuple[Callable[..., Any], int, int]:
    """For blocks of this type: diffusers' function to unpack them, the weights in a block, and its bytes."""
    from diffusers.quantizers.gguf import utils

    key = next(key for key in utils.dequantize_functions if key.name == quant_type)
    return utils.dequantize_functions[key], *utils.GGML_QUANT_SIZES[key]


class PackedUnknown(PackedLinear):
    """A layer in an unknown quantized format: its bytes are known, and it is assumed to be unpacked whole."""

    def __init__(self, linear: torch.nn.Linear, quantized: str, size_bytes: int) -> None:
        """Replace `linear` with a layer whose weight takes `size_bytes`."""
        self.__dict__["size_bytes"] = size_bytes
        super().__init__(linear)
        self.size_bytes, self.quantized = size_bytes, quantized

    def layout(self, weight: torch.Tensor) -> Layout:
        """One tensor with the bytes of the weight."""
        return {"weight": (0, weight.dtype), "packed": (self.__dict__["size_bytes"], torch.uint8)}

    def same_kind(self, linear: torch.nn.Linear) -> PackedLinear:
        """Pack another plain layer of the same size in the same way."""
        return PackedUnknown(linear, self.quantized, self.size_bytes)

    @property
    def kind(self) -> str:
        """The key of the format, which includes the bytes."""
        return f"{self.quantized} {self.size_bytes}"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Unpack the weight to the dtype of the input, then multiply."""
        codes = self.packed[:1].expand(self.out_features, self.in_features)
        unpacked = codes.to(input.dtype, memory_format=torch.contiguous_format)
        return functional.linear(input, unpacked, None if self.bias is None else self.bias.to(input.dtype))


_STAND_INS: Mapping[str, type[PackedLinear]] = {
    cls.quantized: cls for cls in (TorchaoInt8, TorchaoFloat8, BitsandbytesNf4, BitsandbytesInt8)
}


def stand_in(layer: torch.nn.Module) -> PackedLinear | None:
    """The stand-in, without data, for a layer that a library has quantized; None for any other layer."""
    weight = layer._parameters.get("weight")
    kind = kind_of(weight) if weight is not None and isinstance(layer, torch.nn.Linear) else ""
    if weight is None or not kind or not isinstance(layer, torch.nn.Linear):
        return None
    dtype = weight.dtype if weight.dtype.is_floating_point else getattr(layer, "compute_dtype", None) or torch.bfloat16
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=dtype, device="meta")
    if layer.bias is not None:
        plain.bias = torch.nn.Parameter(torch.empty_like(layer.bias, device="meta"), requires_grad=False)
    if kind.startswith("gguf "):
        return GgufLinear(plain, gguf_type(weight)).eval()
    return stand_in_of(plain, kind, tensor_bytes(weight)).eval()


def stand_in_of(linear: torch.nn.Linear, quantized: str, size_bytes: int) -> PackedLinear:
    """The stand-in for a plain layer, with its weight quantized in this format and of this size."""
    cls = _STAND_INS.get(quantized)
    made = cls(linear) if cls is not None else None
    if made is not None and packed_bytes(made) == size_bytes:
        return made
    return PackedUnknown(linear, quantized, size_bytes)


def packed_bytes(layer: PackedLinear) -> int:
    """The bytes of all parts of a stand-in's weight."""
    return sum(tensor_bytes(part) for part in weight_parts(layer))


def weight_parts(layer: PackedLinear) -> list[torch.Tensor]:
    """The tensors that a stand-in has in place of a weight: all but the bias."""
    parameters = [part for name, part in layer.named_parameters(recurse=False) if name != "bias"]
    return [*parameters, *layer.buffers(recurse=False)]


def pack(
    module: torch.nn.Module,
    cls: Callable[[torch.nn.Linear], PackedLinear],
    select: Callable[[str, torch.nn.Linear], bool],
) -> None:
    """Replace the linear layers for which `select(path, layer)` is true with stand-ins, in place."""
    for path, linear in list(module.named_modules()):
        if isinstance(linear, torch.nn.Linear) and not isinstance(linear, PackedLinear) and select(path, linear):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, cls(linear))


def _parameter_like(weight: torch.Tensor, count: int, dtype: torch.dtype) -> torch.nn.Parameter:
    """A parameter of `count` elements, on the device of the weight and of its tensor class."""
    piece = weight.detach().reshape(-1)[:1].expand(count)
    return torch.nn.Parameter(piece.to(dtype, copy=True, memory_format=torch.contiguous_format), requires_grad=False)
