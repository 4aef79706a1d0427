"""torchao: the weights of linear layers are rounded to 8 bits after loading and unpacked layer by layer as they run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from vramplan.pipeline.types import Component
from vramplan.strategies.base import Axis, Quality, missing_package, worth_quantizing

if TYPE_CHECKING:
    import torch

_CONFIGS = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Torchao:
    """`torchao.quantization.quantize_(component, Int8WeightOnlyConfig())`, on the pipeline as it is loaded.

    int8 is considered near lossless, float8 lossy: a weight is off by 0.4 % of the largest in its row with 8 bits in
    even steps, and by up to 6 % of itself with the 3 mantissa bits of float8_e4m3fn. (Pictures of FLUX.1-dev with both:
    Hugging Face blog diffusers-quantization, May 2025.) Rounded weights cannot be restored.
    """

    name: ClassVar[str] = "torchao"
    axis: ClassVar[Axis] = "weights"
    stock: ClassVar[bool] = True

    type: Literal["int8", "float8", "int4"] = "int8"

    @property
    def quality(self) -> Quality:
        """Near lossless for int8, else lossy."""
        return "near_lossless" if self.type == "int8" else "lossy"

    @property
    def quantized(self) -> str:
        """The value of `Component.quantized`."""
        return f"{self.name} {self.type}"

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """int8, for denoisers and large text encoders: float8 weighs as much, rounds more, and takes longer."""
        return (cls(),) if worth_quantizing(component) else ()

    def refusal(self, component: Component) -> str | None:
        """Refuse quantized components, layers that are used without a call, and int4."""
        if self.type == "int4":
            return (
                "torchao 0.18 packs int4 weights only on a GPU and with kernels of another package (mslk); "
                "use type=int8, or bitsandbytes:type=nf4"
            )
        return component.quantization_refusal or missing_package("torchao")

    def lighten(self, module: torch.nn.Module) -> None:
        """Replace the layers of `quantize_` by stand-ins: linear ones, except the last of torch's own attention."""
        from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

        from vramplan.pipeline.packed_linear import TorchaoFloat8, TorchaoInt8, pack

        cls = TorchaoInt8 if self.type == "int8" else TorchaoFloat8
        pack(module, cls, lambda _, linear: not isinstance(linear, NonDynamicallyQuantizableLinear))

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Quantize each component, before it is hooked or moved."""
        from torchao import quantization

        for name in names:
            quantization.quantize_(pipe.components[name], getattr(quantization, _CONFIGS[self.type])())

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Do nothing: rounded weights cannot be restored."""

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """An import and one call for each component."""
        config = _CONFIGS[self.type]
        calls = [f"quantize_(pipe.{name}, {config}())" for name in names]
        return [f"from torchao.quantization import {config}, quantize_", *calls]
