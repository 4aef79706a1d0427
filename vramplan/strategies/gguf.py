"""GGUF: the weights of a component come from a file where they are rounded in blocks, in the format of llama.cpp."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vramplan.errors import VramplanError
from vramplan.pipeline.types import Component
from vramplan.strategies.base import NO_FILE, Axis, FileName, LoadRecord, Quality, missing_package

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Gguf:
    """`from_single_file` with `GGUFQuantizationConfig`, for a diffusers component that is loaded from `file`.

    Files have 2 to 8 bits per weight; all are considered lossy. A live pipeline cannot take this setting.
    """

    name: ClassVar[str] = "gguf"
    axis: ClassVar[Axis] = "weights"
    stock: ClassVar[bool] = True
    quality: ClassVar[Quality] = "lossy"
    quantized: ClassVar[str] = "gguf"
    loads_on_device: ClassVar[bool] = False

    file: FileName = NO_FILE

    @property
    def source(self) -> Path:
        """The path of the file."""
        return Path(self.file).expanduser()

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """Empty: only the user knows the file."""
        return ()

    def refusal(self, component: Component) -> str | None:
        """Refuse a loaded component, one that diffusers cannot load from GGUF, and a file of another model."""
        if not self.file:
            return "gguf needs a file: write gguf:file=PATH"
        if component.quantization_refusal:
            return component.quantization_refusal
        if component.device is not None:
            return (
                f"a GGUF file is read while {component.name} is loaded, and this pipeline is loaded already: "
                "plan for its folder and load it with `vramplan apply`"
            )
        missing = missing_package("gguf")
        if missing is not None:
            return missing
        from vramplan.pipeline.gguf_file import block_types

        try:
            block_types(self.source, component.library, component.class_name, component.config)
        except VramplanError as error:
            return str(error)
        return None

    def lighten(self, module: torch.nn.Module) -> None:
        """Replace each linear layer whose weight the file has in blocks by a stand-in."""
        from vramplan.pipeline.component import plain_config
        from vramplan.pipeline.gguf_file import block_types
        from vramplan.pipeline.packed_linear import GgufLinear, pack

        types = block_types(self.source, "diffusers", type(module).__name__, plain_config(module))
        for kind in set(types.values()):
            pack(module, partial(GgufLinear, quant_type=kind), partial(_has_type, types, kind))

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Do nothing: the setting takes effect while loading."""

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Do nothing: the component's own weights were never loaded."""

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """Empty: the setting takes effect while loading."""
        return []

    def load(self, record: LoadRecord) -> dict[str, Any]:
        """Return the quantization configuration with the dtype to compute in."""
        import diffusers
        import torch

        return {"quantization_config": diffusers.GGUFQuantizationConfig(compute_dtype=getattr(torch, record.dtype))}

    def load_code(self, record: LoadRecord) -> tuple[str, str]:
        """Return the same as text."""
        config = f"diffusers.GGUFQuantizationConfig(compute_dtype=torch.{record.dtype})"
        return "import diffusers", f", quantization_config={config}"


def _has_type(types: Mapping[str, str], kind: str, path: str, _: torch.nn.Linear) -> bool:
    return types.get(f"{path}.weight") == kind
