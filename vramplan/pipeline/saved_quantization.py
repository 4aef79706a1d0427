"""Find layers saved with quantized weights by the names of their tensors, and insert stand-ins for them.

The names are those that the libraries write: bitsandbytes 0.50 (`quant_state` for a 4-bit weight, `SCB` for an 8-bit
one) and torchao 0.18 (`_weight_qdata` and others, with the tensor class in the file's metadata).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vramplan.errors import VramplanError
from vramplan.pipeline.quantization import torchao_kind
from vramplan.pipeline.repository import StoredTensor

if TYPE_CHECKING:
    import torch

_FOUR_BIT, _EIGHT_BIT, _TORCHAO = ".weight.quant_state.bitsandbytes__", ".SCB", "._weight_"
# Quantized scales have an offset, which is saved in the text of the `quant_state`.
_NESTED, _OFFSET_BYTES = ".nested_absmax", 4
# Tensors in the files that are read when a weight is loaded, and then dropped.
_NOT_KEPT = (".weight.quant_state.", ".weight_format")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedLayer:
    """A layer with a weight saved quantized: its format, as in `Component.quantized`, and its bytes once loaded."""

    quantized: str
    size_bytes: int


def saved_layers(tensors: Iterable[StoredTensor], metadata: Mapping[str, str]) -> dict[str, SavedLayer]:
    """The quantized layers by name, from the tensors and metadata of one or several files."""
    tensors = list(tensors)
    kinds = {path: kind for tensor in tensors for path, kind in _layer_kind(tensor.name, metadata)}
    sizes = dict.fromkeys(kinds, 0)
    for tensor in tensors:
        path = layer_name(tensor.name)
        if path in sizes and not any(part in tensor.name for part in _NOT_KEPT):
            sizes[path] += tensor.size_bytes + (_OFFSET_BYTES if tensor.name.endswith(_NESTED) else 0)
    return {path: SavedLayer(quantized=kind, size_bytes=sizes[path]) for path, kind in kinds.items()}


def layer_name(name: str) -> str | None:
    """The name of the layer whose weight includes this tensor; None if it is not part of a weight."""
    for part in (_TORCHAO, ".weight", _EIGHT_BIT):
        path, found, _ = name.partition(part)
        if found:
            return path
    return None


def keeps_saved_dtype(module: torch.nn.Module, layers: Mapping[str, SavedLayer]) -> bool:
    """Whether loading keeps plain tensors in their saved dtype, whichever is requested: transformers does with
    bitsandbytes (5.23), diffusers and torchao do not."""
    own = type(module).__module__.partition(".")[0] == "transformers"
    return own and any(layer.quantized.startswith("bitsandbytes ") for layer in layers.values())


def pack_layers(module: torch.nn.Module, layers: Mapping[str, SavedLayer]) -> None:
    """Replace these layers of the module with stand-ins, in place.

    Raises:
        VramplanError: one of them is not a linear layer of the module.
    """
    import torch

    from vramplan.pipeline.packed_linear import stand_in_of

    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        try:
            linear = module.get_submodule(path)
        except AttributeError:
            linear = None
        if not isinstance(linear, torch.nn.Linear):
            raise VramplanError(
                f"{path} is saved quantized ({layer.quantized}), and no linear layer of {type(module).__name__}: load "
                "the pipeline and call vramplan.auto_configure(pipe)"
            )
        setattr(module.get_submodule(parent), name, stand_in_of(linear, layer.quantized, layer.size_bytes))


def _layer_kind(name: str, metadata: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    path = layer_name(name)
    if path is None:
        return
    if _FOUR_BIT in name:
        yield path, f"bitsandbytes {name.rpartition('__')[2]}"
    elif name.endswith(_EIGHT_BIT):
        yield path, "bitsandbytes int8"
    elif _TORCHAO in name:
        yield path, _torchao_kind(metadata.get(f"{path}.weight", ""))


def _torchao_kind(text: str) -> str:
    """The format of a torchao weight, from its metadata."""
    try:
        made = json.loads(text)
        return torchao_kind(str(made["_type"]), plain=made["_data"].get("act_quant_kwargs") is None)
    except (ValueError, LookupError, TypeError, AttributeError):
        return "torchao"
