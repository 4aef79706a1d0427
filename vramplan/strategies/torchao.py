"""torchao: the weights of linear layers rounded to 8 bits after loading, and unpacked layer by layer as they run."""

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

    int8 is taken to be nearly lossless, float8 lossy: one weight is off by 0.4 % of its row's largest with 8 bits
    in even steps, and by up to 6 % of itself with the 3 bits that float8_e4m3fn has behind the point. (Pictures of
    FLUX.1-dev under both: Hugging Face blog diffusers-quantization, May 2025.) What was rounded cannot be put back.
    """

    name: ClassVar[str] = "torchao"
    axis: ClassVar[Axis] = "weights"

    type: Literal["int8", "float8", "int4"] = "int8"

    @property
    def quality(self) -> Quality:
        """By the bits that are left."""
        return "near_lossless" if self.type == "int8" else "lossy"

    @property
    def quantized(self) -> str:
        """As `Component.quantized`."""
        return f"{self.name} {self.type}"

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """int8, for denoisers and large text encoders: float8 weighs as much, rounds more, and takes longer."""
        return (cls(),) if worth_quantizing(component) else ()

    def refusal(self, component: Component) -> str | None:
        """What is rounded already, layers that are used without a call, and what torchao cannot make."""
        if self.type == "int4":
            return (
                "torchao 0.18 packs int4 weights only on a GPU and with kernels of another package (mslk); "
                "use type=int8, or bitsandbytes:type=nf4"
            )
        return component.quantization_refusal or missing_package("torchao")

    def lighten(self, module: torch.nn.Module) -> None:
        """Stand-ins for the layers `quantize_` takes: linear ones, but the last of torch's own attention."""
        from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

        from vramplan.pipeline.packed_linear import TorchaoFloat8, TorchaoInt8, pack

        cls = TorchaoInt8 if self.type == "int8" else TorchaoFloat8
        pack(module, cls, lambda _, linear: not isinstance(linear, NonDynamicallyQuantizableLinear))

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Component by component, before anything is hooked or moved."""
        from torchao import quantization

        for name in names:
            quantization.quantize_(pipe.components[name], getattr(quantization, _CONFIGS[self.type])())

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Nothing can be put back."""

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """An import and one call for each component."""
        config = _CONFIGS[self.type]
        calls = [f"quantize_(pipe.{name}, {config}())" for name in names]
        return [f"from torchao.quantization import {config}, quantize_", *calls]
