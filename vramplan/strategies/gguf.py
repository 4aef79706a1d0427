"""GGUF: the weights of a component from a file in which they are rounded in blocks, as llama.cpp does it."""

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
    """`from_single_file` with `GGUFQuantizationConfig`, for a component of diffusers' own that is loaded from `file`.

    Files are of 2 to 8 bits a weight: lossy, whichever. A live pipeline cannot be given one.
    """

    name: ClassVar[str] = "gguf"
    axis: ClassVar[Axis] = "weights"
    quality: ClassVar[Quality] = "lossy"
    quantized: ClassVar[str] = "gguf"
    loads_on_device: ClassVar[bool] = False

    file: FileName = NO_FILE

    @property
    def source(self) -> Path:
        """The file."""
        return Path(self.file).expanduser()

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """None: nobody but the user knows which files there are."""
        return ()

    def refusal(self, component: Component) -> str | None:
        """What is loaded already, what diffusers loads from no such file, and a file that does not hold it."""
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
        """A stand-in for every linear layer whose weight the file has in blocks."""
        from vramplan.pipeline.component import plain_config
        from vramplan.pipeline.gguf_file import block_types
        from vramplan.pipeline.packed_linear import GgufLinear, pack

        types = block_types(self.source, "diffusers", type(module).__name__, plain_config(module))
        for kind in set(types.values()):
            pack(module, partial(GgufLinear, quant_type=kind), partial(_is_of, types, kind))

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Nothing: what was not loaded so was refused."""

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Nothing can be put back."""

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """Nothing after loading."""
        return []

    def load(self, record: LoadRecord) -> dict[str, Any]:
        """The configuration, with the dtype to compute in."""
        import diffusers
        import torch

        return {"quantization_config": diffusers.GGUFQuantizationConfig(compute_dtype=getattr(torch, record.dtype))}

    def load_code(self, record: LoadRecord) -> tuple[str, str]:
        """The same as text."""
        config = f"diffusers.GGUFQuantizationConfig(compute_dtype=torch.{record.dtype})"
        return "import diffusers", f", quantization_config={config}"


def _is_of(types: Mapping[str, str], kind: str, path: str, _: torch.nn.Linear) -> bool:
    return types.get(f"{path}.weight") == kind
