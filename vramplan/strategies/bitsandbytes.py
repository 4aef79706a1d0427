"""bitsandbytes: the weights of linear layers are rounded to 8 or 4 bits while they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from vramplan.pipeline.types import Component
from vramplan.strategies.base import Axis, LoadRecord, Quality, missing_package, worth_quantizing

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Bitsandbytes:
    """`BitsAndBytesConfig` of diffusers or transformers, for the component that is loaded with it.

    int8 (LLM.int8(), Dettmers et al. 2022: "without performance degradation") is considered near lossless, nf4 lossy
    with 16 values for the weights of a block. A live pipeline cannot take this setting.
    """

    name: ClassVar[str] = "bitsandbytes"
    axis: ClassVar[Axis] = "weights"
    stock: ClassVar[bool] = True
    source: ClassVar[None] = None
    loads_on_device: ClassVar[bool] = True  # it quantizes there (0.50)

    type: Literal["nf4", "int8"] = "nf4"

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
        """nf4, for denoisers and large text encoders: int8 weighs as much as torchao's, and needs more to run."""
        return (cls(),) if worth_quantizing(component) else ()

    def refusal(self, component: Component) -> str | None:
        """Refuse a component that is loaded or quantized already, and a missing package."""
        if component.quantization_refusal:
            return component.quantization_refusal
        if component.device is not None:
            return (
                f"bitsandbytes quantizes {component.name} while it is loaded, and this pipeline is loaded already: "
                "plan for its folder and load it with `vramplan apply`"
            )
        return missing_package(self.name)

    def lighten(self, module: torch.nn.Module) -> None:
        """Replace the layers that loading would replace by stand-ins."""
        from vramplan.pipeline.packed_linear import BitsandbytesInt8, BitsandbytesNf4, pack

        pack(module, BitsandbytesInt8 if self.type == "int8" else BitsandbytesNf4, _replaced_layers(module))

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Do nothing: the setting takes effect while loading."""

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Do nothing: rounded weights cannot be restored."""

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """Empty: the setting takes effect while loading."""
        return []

    def load(self, record: LoadRecord) -> dict[str, Any]:
        """Return the quantization configuration of the component's library."""
        import importlib

        import torch

        config = importlib.import_module(record.library).BitsAndBytesConfig
        kinds = {"load_in_8bit": True} if self.type == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        computed = {} if self.type == "int8" else {"bnb_4bit_compute_dtype": getattr(torch, record.dtype)}
        return {"quantization_config": config(**kinds, **computed)}

    def load_code(self, record: LoadRecord) -> tuple[str, str]:
        """Return the same as text."""
        options = "load_in_8bit=True"
        if self.type == "nf4":
            options = f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.{record.dtype}'
        return f"import {record.library}", f", quantization_config={record.library}.BitsAndBytesConfig({options})"


def _replaced_layers(module: torch.nn.Module) -> Callable[[str, torch.nn.Linear], bool]:
    """Return a test for the linear layers that loading replaces: transformers 5.23 keeps output layers and tied ones,
    both libraries keep those that a class has in float32 (diffusers 0.42, `_replace_with_bnb_linear`)."""
    kept = list(getattr(module, "_keep_in_fp32_modules", None) or ())
    if hasattr(module, "get_output_embeddings"):
        import torch
        from transformers.quantizers.base import HfQuantizer
        from transformers.quantizers.quantizers_utils import should_convert_module

        patterns = HfQuantizer.get_modules_to_not_convert(module, None, kept)
        return lambda path, linear: type(linear) is torch.nn.Linear and should_convert_module(path, patterns)
    return lambda path, _: not any(f"{key}." in path or key == path for key in kept)
