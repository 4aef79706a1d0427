"""Stand-ins for quantized linear layers, on tensors without data: what they hold, and what a forward takes.

Each one does what the library's own forward does on an accelerator, operation by operation, so that a simulation
charges the packed weights while they lie, and the unpacked copy while it is used.
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
# The threshold above which LLM.int8() keeps activations as they are (transformers' and diffusers' BitsAndBytesConfig).
_OUTLIER_THRESHOLD = 6.0

Layout = Mapping[str, tuple[int, torch.dtype]]


class PackedLinear(torch.nn.Linear):
    """A linear layer with a packed weight. `quantized` says by what, as `Component.quantized` does."""

    quantized: str
    packed: torch.nn.Parameter
    scale: torch.nn.Parameter

    def __init__(self, linear: torch.nn.Linear) -> None:
        """In place of `linear`, whose weight and bias are on one device."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, (count, dtype) in self.layout(linear.weight).items():
            self.register_parameter(name, _parameter_like(linear.weight, count, dtype))
        self.bias = linear.bias
        self.train(linear.training)

    def layout(self, weight: torch.Tensor) -> Layout:
        """The tensors kept in place of this weight: how many elements, and of which dtype."""
        raise NotImplementedError

    def same_kind(self, linear: torch.nn.Linear) -> PackedLinear:
        """Another plain layer, packed as this one."""
        return type(self)(linear)

    @property
    def kind(self) -> str:
        """What layers have in common that take the same where they are of one size."""
        return self.quantized


class TorchaoInt8(PackedLinear):
    """`torchao.quantization.Int8Tensor`, by row (0.18): the weight is cast, multiplied, and the product scaled.

    Its `weight` says that it is of the dtype it was before, as torchao's does.
    """

    quantized = "torchao int8"

    def layout(self, weight: torch.Tensor) -> Layout:
        """One byte a weight; a scale and a zero point for each row."""
        return {
            "weight": (0, weight.dtype),
            "packed": (weight.numel(), torch.int8),
            "scale": (self.out_features, torch.float32),
            "zero_point": (self.out_features, torch.int8),
        }

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`Int8Tensor`'s `linear`, weight only."""
        codes = self.packed.view(self.out_features, self.in_features).t()
        product = torch.mm(input.reshape(-1, self.in_features), codes.to(input.dtype))
        made = (product * self.scale.to(product.dtype)).reshape(*input.shape[:-1], self.out_features)
        if self.bias is not None:
            made += self.bias
        return made


class TorchaoFloat8(PackedLinear):
    """`torchao.quantization.Float8Tensor`, by row (0.18): the weight is unpacked by way of float32."""

    quantized = "torchao float8"

    def layout(self, weight: torch.Tensor) -> Layout:
        """One byte a weight, and a scale for each row."""
        return {
            "weight": (0, weight.dtype),
            "packed": (weight.numel(), torch.float8_e4m3fn),
            "scale": (self.out_features, torch.float32),
        }

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`Float8Tensor`'s `linear`, weight only."""
        made = torch.matmul(input, self._unpacked(self.weight.dtype))
        return made if self.bias is None else made + self.bias

    def _unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """Both copies in float32 are there until the last one is made, as in torchao's `_dequantize_affine_float8`."""
        wide = self.packed.view(self.out_features, self.in_features).t().to(torch.float32)
        scaled = wide * self.scale
        return scaled.to(dtype)


class BitsandbytesNf4(PackedLinear):
    """`bitsandbytes.nn.Linear4bit` (0.50): unpacked whole, then multiplied.

    bitsandbytes multiplies a few rows without unpacking, by a rule that depends on the card: charged all the same.
    """

    quantized = "bitsandbytes nf4"

    def layout(self, weight: torch.Tensor) -> Layout:
        """Half a byte a weight, a scale for each block, and the table of values."""
        return {
            "weight": ((weight.numel() + 1) // 2, torch.uint8),
            "absmax": (-(-weight.numel() // _BLOCK), torch.float32),
            "quant_map": (_VALUES, torch.float32),
        }

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`Linear4bit.forward`."""
        pairs = self.weight.unsqueeze(1).expand(-1, 2)
        unpacked = pairs.to(input.dtype, memory_format=torch.contiguous_format).view(-1)
        unpacked = unpacked[: self.out_features * self.in_features].view(self.out_features, self.in_features)
        return functional.linear(input, unpacked, None if self.bias is None else self.bias.to(input.dtype))


class BitsandbytesInt8(PackedLinear):
    """`bitsandbytes.nn.Linear8bitLt` (0.50): activations are quantized too, the product is of 32 bits first."""

    quantized = "bitsandbytes int8"

    def layout(self, weight: torch.Tensor) -> Layout:
        """One byte a weight, and a scale for each row."""
        return {"weight": (weight.numel(), torch.int8), "SCB": (self.out_features, torch.float32)}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`MatMul8bitLt.forward` without outliers, which are few."""
        rows = input.reshape(-1, self.in_features)
        codes = self._quantized(rows.to(torch.float16))
        product = input.new_empty((len(rows), self.out_features), dtype=torch.int32)
        made = product.to(torch.float16)
        if self.bias is not None:
            made += self.bias.to(torch.float16)
        del codes
        return made.to(input.dtype).reshape(*input.shape[:-1], self.out_features)

    def _quantized(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stats, codes = rows[:, 0].to(torch.float32), rows.to(torch.int8)
        _ = rows.abs() >= _OUTLIER_THRESHOLD
        return codes, stats


class GgufLinear(PackedLinear):
    """`GGUFLinear` of diffusers (0.42): unpacked whole by diffusers' own functions, on tensors without data here.

    Its optional CUDA kernels (`DIFFUSERS_GGUF_CUDA_KERNELS`) take less; they are not reckoned with.
    """

    def __init__(self, linear: torch.nn.Linear, quant_type: str) -> None:
        """In place of `linear`, in whose dtype it computes. `quant_type` is ggml's name of it, as `Q4_K`."""
        self.quant_type, self.compute_dtype = quant_type, linear.weight.dtype
        self.quantized = f"gguf {quant_type}"
        super().__init__(linear)

    def layout(self, weight: torch.Tensor) -> Layout:
        """The blocks as they are in the file."""
        _, block, size = _ggml(self.quant_type)
        return {"weight": (weight.numel() // block * size, torch.uint8)}

    def same_kind(self, linear: torch.nn.Linear) -> PackedLinear:
        """Another plain layer, in blocks of the same type."""
        return GgufLinear(linear, self.quant_type)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`GGUFLinear.forward_native`."""
        weight = self._unpacked()
        weight = weight.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return functional.linear(input, weight, bias)

    def _unpacked(self) -> torch.Tensor:
        unpack, block, size = _ggml(self.quant_type)
        made: torch.Tensor = unpack(self.weight.reshape(-1, size), block, size)
        return made.reshape(self.out_features, self.in_features)


def _ggml(quant_type: str) -> tuple[Callable[..., Any], int, int]:
    """How diffusers unpacks blocks of this type, the weights in a block, and its bytes."""
    from diffusers.quantizers.gguf import utils

    key = next(key for key in utils.dequantize_functions if key.name == quant_type)
    return utils.dequantize_functions[key], *utils.GGML_QUANT_SIZES[key]


class PackedUnknown(PackedLinear):
    """A layer quantized in a way that nothing more is known of: so many bytes, unpacked whole."""

    def __init__(self, linear: torch.nn.Linear, quantized: str, size_bytes: int) -> None:
        """In place of `linear`."""
        self.__dict__["size_bytes"] = size_bytes
        super().__init__(linear)
        self.size_bytes, self.quantized = size_bytes, quantized

    def layout(self, weight: torch.Tensor) -> Layout:
        """So many bytes."""
        return {"weight": (0, weight.dtype), "packed": (self.__dict__["size_bytes"], torch.uint8)}

    def same_kind(self, linear: torch.nn.Linear) -> PackedLinear:
        """Another plain layer of the same size, packed as this one."""
        return PackedUnknown(linear, self.quantized, self.size_bytes)

    @property
    def kind(self) -> str:
        """By its bytes too."""
        return f"{self.quantized} {self.size_bytes}"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The weight in the dtype of the input, then the product."""
        codes = self.packed[:1].expand(self.out_features, self.in_features)
        unpacked = codes.to(input.dtype, memory_format=torch.contiguous_format)
        return functional.linear(input, unpacked, None if self.bias is None else self.bias.to(input.dtype))


_STAND_INS: Mapping[str, type[PackedLinear]] = {
    cls.quantized: cls for cls in (TorchaoInt8, TorchaoFloat8, BitsandbytesNf4, BitsandbytesInt8)
}


def stand_in(layer: torch.nn.Module) -> PackedLinear | None:
    """What stands for a layer that a library has quantized, without data; None for any other."""
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
    """What stands for a plain layer whose weight is quantized so, in so many bytes."""
    cls = _STAND_INS.get(quantized)
    made = cls(linear) if cls is not None else None
    if made is not None and packed_bytes(made) == size_bytes:
        return made
    return PackedUnknown(linear, quantized, size_bytes)


def packed_bytes(layer: PackedLinear) -> int:
    """The bytes of a stand-in's weight, all parts of it."""
    return sum(tensor_bytes(part) for part in weight_parts(layer))


def weight_parts(layer: PackedLinear) -> list[torch.nn.Parameter]:
    """What a stand-in has in place of a weight: all but the bias."""
    return [part for name, part in layer.named_parameters(recurse=False) if name != "bias"]


def pack(
    module: torch.nn.Module,
    cls: Callable[[torch.nn.Linear], PackedLinear],
    chosen: Callable[[str, torch.nn.Linear], bool],
) -> None:
    """Put a stand-in in place of every linear layer of the module that is `chosen` by its name, in place."""
    for path, linear in list(module.named_modules()):
        if isinstance(linear, torch.nn.Linear) and not isinstance(linear, PackedLinear) and chosen(path, linear):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, cls(linear))


def _parameter_like(weight: torch.Tensor, count: int, dtype: torch.dtype) -> torch.nn.Parameter:
    """A parameter of so many elements, where the weight is and of its kind."""
    piece = weight.detach().reshape(-1)[:1].expand(count)
    return torch.nn.Parameter(piece.to(dtype, copy=True, memory_format=torch.contiguous_format), requires_grad=False)
