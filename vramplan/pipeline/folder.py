"""Describe a pipeline saved in a local folder, from its configurations and safetensors headers.

No weight is read: a header says the name, dtype and shape of every tensor in the first kilobytes of a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.errors import VramplanError
from vramplan.pipeline.build import build_weightless, component_class
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.dtypes import SAFETENSORS_DTYPES, cast_as_loaded
from vramplan.pipeline.geometry import tensors_of
from vramplan.pipeline.live import assemble
from vramplan.pipeline.saved import SavedLayer, SavedTensor, keeps_saved_dtype, layer_of, packed_layers, put_packed
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.units import format_bytes

if TYPE_CHECKING:
    import torch

INDEX = "model_index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """What the weight files of one component hold: elements and bytes, and the dtype most bytes have.

    Of what is `packed`, layers with quantized weights, only the bytes count.
    """

    elements: int
    size_bytes: int
    dtype: str
    packed: Mapping[str, SavedLayer]


def spec_from_folder(folder: Path, *, dtype: str | None = None, allow_pickle: bool = False) -> PipelineSpec:
    """The description of the pipeline in `folder`, as loading it with `dtype` would make it.

    Without `dtype` each component keeps the dtype it is stored in, so that loading changes nothing.

    Raises:
        VramplanError: not a pipeline folder, a part of it missing or damaged, a class unknown here, or
            weights that are pickles while `allow_pickle` is off.
    """
    index = read_index(folder)
    cls = pipeline_class(folder, index)
    parts = tuple(_components(folder, index, dtype=dtype, allow_pickle=allow_pickle))
    notes = tuple(note for _, note in parts if note)
    return assemble(cls, tuple(component for component, _ in parts), source=str(folder), notes=notes)


def read_index(folder: Path) -> Mapping[str, Any]:
    """The folder's `model_index.json`. Raises VramplanError where there is none or it is damaged."""
    if not folder.is_dir():
        raise VramplanError(f"{folder}: no such folder")
    if not (folder / INDEX).is_file():
        raise VramplanError(f"{folder} has no {INDEX}: it is not a saved diffusers pipeline")
    return read_json(folder / INDEX)


def pipeline_class(folder: Path, index: Mapping[str, Any]) -> type:
    """The diffusers class the index names. Raises VramplanError for a class that is not diffusers' own."""
    import diffusers

    name = index.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise VramplanError(
            f"{folder / INDEX}: _class_name {name!r} is not a pipeline class of diffusers {diffusers.__version__}"
        )
    return found


def stored_weights(folder: Path) -> StoredWeights | None:
    """What the component's safetensors files hold, read from their headers; None where there are none.

    Raises:
        VramplanError: a file that the index names is missing, or a header that cannot be read.
    """
    files = _weight_files(folder)
    if not files:
        return None
    headers = [_header(path) for path in files]
    tensors = [tensor for found, _ in headers for tensor in found]
    packed = packed_layers(tensors, {key: text for _, metadata in headers for key, text in metadata.items()})
    plain = [tensor for tensor in tensors if layer_of(tensor.name) not in packed]
    by_dtype: dict[str, int] = {}
    for tensor in plain:
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.size_bytes
    floating = {name: size for name, size in by_dtype.items() if "float" in name} or by_dtype
    return StoredWeights(
        elements=sum(tensor.elements for tensor in plain),
        size_bytes=sum(tensor.size_bytes for tensor in tensors),
        dtype=max(floating, key=lambda name: floating[name], default="float32"),
        packed=packed,
    )


def _components(
    folder: Path, index: Mapping[str, Any], *, dtype: str | None, allow_pickle: bool
) -> Iterable[tuple[Component, str | None]]:
    import torch

    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or None in entry:
            continue
        library, class_name = entry
        if not isinstance(library, str) or not isinstance(class_name, str):
            raise VramplanError(f"{folder / INDEX}: {name} must name a library and a class, not {entry!r}")
        cls = component_class(library, class_name)
        if isinstance(cls, type) and issubclass(cls, torch.nn.Module):
            yield _component(folder / name, name, library, class_name, dtype=dtype, allow_pickle=allow_pickle)


def _component(
    folder: Path, name: str, library: str, class_name: str, *, dtype: str | None, allow_pickle: bool
) -> tuple[Component, str | None]:
    read_json(folder / "config.json")  # what a missing folder lacks first
    stored = stored_weights(folder)
    if stored is None and not allow_pickle:
        variants = sorted(path.name for path in folder.glob("*.safetensors"))
        if variants:
            raise VramplanError(f"{folder} holds only {variants[0]}: variants cannot be read yet; save it without one")
        raise VramplanError(
            f"{folder} has no safetensors weights; pass --allow-pickle to load pickled weights you trust"
        )
    stored_dtype = stored.dtype if stored else "float32"
    module = weightless_component(folder, library, class_name, dtype or stored_dtype)
    # pickles may be read whole; what loading makes of quantized weights is taken to be the process's own memory
    converted = stored is None or dtype not in (None, stored_dtype) or bool(stored.packed)
    component = describe_component(name, module, library=library, converted_at_load=converted)
    return component, _disagreement(folder, module, stored)


def weightless_component(folder: Path, library: str, class_name: str, dtype: str) -> torch.nn.Module:
    """The component in its folder as loading it in this dtype would make it, without data; quantized where it was
    saved so.

    Raises:
        VramplanError: a part of it is missing or damaged, or quantized in a way that the files do not tell.
    """
    config = read_json(folder / "config.json")
    quantization = config.pop("quantization_config", None)
    module = build_weightless(library, class_name, config)
    if quantization is None:
        cast_as_loaded(module, dtype)
        return module
    stored = stored_weights(folder)
    if stored is None or not stored.packed:
        raise VramplanError(
            f"{folder}: its weights are quantized, not by bitsandbytes or torchao into safetensors files; load the "
            "pipeline and call vramplan.auto_configure(pipe)"
        )
    cast_as_loaded(module, stored.dtype if keeps_saved_dtype(module, stored.packed) else dtype)
    put_packed(module, stored.packed)
    return module


def _disagreement(folder: Path, module: torch.nn.Module, stored: StoredWeights | None) -> str | None:
    """A note, where the files hold another number of elements than the class has saved tensors."""
    if stored is None:
        return f"{folder.name}: sizes are those of the class; its weights are pickles, which were not read"
    expected = sum(tensor.numel() for tensor in tensors_of(module) if id(tensor) not in _packed_tensors(module))
    unsaved = sum(tensor.numel() for tensor in _unsaved_tensors(module))
    if expected - unsaved == stored.elements:
        return None
    return (
        f"{folder.name}: its files hold {stored.elements:,} elements ({format_bytes(stored.size_bytes)}), "
        f"{type(module).__name__} has {expected - unsaved:,}; the plan counts what will be loaded"
    )


def _packed_tensors(module: torch.nn.Module) -> frozenset[int]:
    """The parts of quantized weights, by identity."""
    from vramplan.pipeline.packed import PackedLinear, weight_parts

    layers = (layer for layer in module.modules() if isinstance(layer, PackedLinear))
    return frozenset(id(part) for layer in layers for part in weight_parts(layer))


def _unsaved_tensors(module: torch.nn.Module) -> Iterable[torch.Tensor]:
    """Buffers that a class computes for itself and does not save."""
    for child in module.modules():
        for name in child._non_persistent_buffers_set:
            buffer = child._buffers.get(name)
            if buffer is not None:
                yield buffer


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files `from_pretrained` would read: one file, or the shards its index names."""
    for stem in ("diffusion_pytorch_model", "model"):
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise VramplanError(f"{index}: its weight_map does not name a file for every tensor")
            shards = [folder / name for name in sorted(set(weight_map.values()))]
            missing = [path for path in shards if not path.is_file()]
            if missing:
                raise VramplanError(f"{index} names {missing[0].name}, which is missing")
            return shards
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    return []


def _header(path: Path) -> tuple[list[SavedTensor], Mapping[str, str]]:
    """The tensors in the file, and its metadata."""
    from huggingface_hub import parse_local_safetensors_file_metadata
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        header = parse_local_safetensors_file_metadata(path)
        with path.open("rb") as file:
            start_of_data = 8 + int.from_bytes(file.read(8), "little")
    except (SafetensorsParsingError, OSError, ValueError) as error:
        raise VramplanError(f"{path}: not a readable safetensors file ({error})") from error
    ends = [tensor.data_offsets[1] for tensor in header.tensors.values()]
    if start_of_data + max(ends, default=0) > path.stat().st_size:
        raise VramplanError(f"{path}: the file ends before its tensors do; download or save it again")
    return [_saved(name, tensor) for name, tensor in header.tensors.items()], header.metadata


def _saved(name: str, tensor: Any) -> SavedTensor:
    start, end = tensor.data_offsets
    dtype = SAFETENSORS_DTYPES.get(tensor.dtype, tensor.dtype.lower())
    return SavedTensor(name=name, dtype=dtype, elements=tensor.parameter_count, size_bytes=end - start)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises VramplanError where it is missing, damaged or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VramplanError(f"{path} is missing") from None
    except (ValueError, OSError) as error:
        raise VramplanError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise VramplanError(f"{path}: expected an object, found {type(content).__name__}")
    return content
