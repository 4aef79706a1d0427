"""Describe a saved pipeline, in a local folder or on the hub, from its configurations and safetensors headers.

No weights are read: a header lists the name, dtype and shape of every tensor in the first kilobytes of a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.errors import UsageError, VramplanError
from vramplan.pipeline.build import build_weightless, component_class, has_weights
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.dtypes import cast_as_loaded
from vramplan.pipeline.geometry import tensors_of
from vramplan.pipeline.live import build_spec
from vramplan.pipeline.repository import FolderRepository, Repository
from vramplan.pipeline.saved_quantization import SavedLayer, keeps_saved_dtype, layer_name, pack_layers, saved_layers
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.units import format_bytes

if TYPE_CHECKING:
    import torch

INDEX = "model_index.json"
# The stems of weight files of diffusers and transformers.
_STEMS = ("diffusion_pytorch_model", "model")
# Suffixes of the scales of 8-bit weights, which other tools than diffusers (0.42) save next to the weights.
_SCALE_SUFFIXES = (".scale_weight", ".weight_scale", ".weight_scale_inv", "scaled_fp8")
# The dtype in which weights are loaded if their stored dtype is not computed in.
_COMPUTE_DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """The content of one component's weight files: elements, bytes, and the dtype of most bytes.

    `packed` holds the layers with quantized weights; these count in the bytes only.
    """

    elements: int
    size_bytes: int
    dtype: str
    packed: Mapping[str, SavedLayer]


def spec_from_folder(folder: Path, **options: Any) -> PipelineSpec:
    """The spec of the pipeline in a local folder; `options` are those of `spec_from_repository`."""
    return spec_from_repository(FolderRepository(folder), **options)


def spec_from_repository(
    repository: Repository, *, dtype: str | None = None, variant: str | None = None, allow_pickle: bool = False
) -> PipelineSpec:
    """The spec of a saved pipeline, as it would be loaded with `dtype`.

    Without `dtype` each component keeps its stored dtype, unless that has 8 bits, in which nothing is computed. A
    component without files of the `variant` is loaded without a variant, as diffusers does.

    Raises:
        VramplanError: not a saved pipeline, a part missing or damaged, an unknown class, or pickled weights without
            `allow_pickle`. UsageError: no component has that variant.
    """
    index = read_index(repository)
    cls = pipeline_class(repository, index)
    parts = tuple(_components(repository, index, cls, dtype=dtype, variant=variant, allow_pickle=allow_pickle))
    components = tuple(component for component, _ in parts)
    if variant is not None and not any(component.variant for component in components):
        found = sorted({name for component in components for name in variants(repository, component.name)})
        available = f"it has {', '.join(found)}" if found else "it has none"
        raise UsageError(f"{repository.where('')}: no component has weights of variant {variant!r}: {available}")
    notes = tuple(note for _, own in parts for note in own)
    return build_spec(cls, components, source=repository.source, notes=notes)


def read_index(repository: Repository) -> Mapping[str, Any]:
    """The repository's `model_index.json`.

    Raises:
        VramplanError: it is missing or damaged, or a component name in it is not an identifier.
    """
    files = repository.names("")
    if INDEX not in files:
        single = min((name for name in files if name.endswith(".safetensors")), default=None)
        advice = f"; if its {single} is a checkpoint in one file, write {repository.where(single)}" if single else ""
        raise VramplanError(f"{repository.where('')} has no {INDEX}: it is not a saved diffusers pipeline{advice}")
    index = repository.read_json(INDEX)
    for name in index:
        if not name.isidentifier():
            raise VramplanError(f"{repository.where(INDEX)}: {name!r} is not a component name")
    return index


def pipeline_class(repository: Repository, index: Mapping[str, Any]) -> type:
    """The diffusers class that the index names. Raises VramplanError if it is not one of diffusers' pipelines."""
    import diffusers

    name = index.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise VramplanError(
            f"{repository.where(INDEX)}: _class_name {name!r} is not a pipeline class of diffusers "
            f"{diffusers.__version__}"
        )
    return found


def stored_weights(repository: Repository, name: str, variant: str | None = None) -> StoredWeights | None:
    """Read the headers of a component's safetensors files; None if it has none.

    Raises:
        VramplanError: a file that the index names is missing, a header cannot be read, or 8-bit weights with scales
            that diffusers would not load.
    """
    files = _weight_files(repository, name, variant)
    if not files:
        return None
    headers = [repository.header(path) for path in files]
    tensors = [tensor for found, _ in headers for tensor in found]
    scaled = next((tensor.name for tensor in tensors if tensor.name.endswith(_SCALE_SUFFIXES)), None)
    if scaled is not None and "quantization_config" not in read_config(repository, name):
        raise VramplanError(
            f"{repository.where(name)}: its weights have 8 bits and separate scales ({scaled}), which diffusers "
            "would not load: take the checkpoint it was made from"
        )
    packed = saved_layers(tensors, {key: text for _, metadata in headers for key, text in metadata.items()})
    plain = [tensor for tensor in tensors if layer_name(tensor.name) not in packed]
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


def variants(repository: Repository, name: str) -> list[str]:
    """The variants of a component's safetensors files, sorted."""
    found = set()
    for file in repository.names(name):
        stem, _, rest = file.removesuffix(".safetensors").partition(".")
        if stem in _STEMS and rest and file.endswith(".safetensors"):
            found.add(rest.partition("-")[0])
    return sorted(found)


def _components(
    repository: Repository,
    index: Mapping[str, Any],
    pipeline: type,
    *,
    dtype: str | None,
    variant: str | None,
    allow_pickle: bool,
) -> Iterable[tuple[Component, Sequence[str]]]:
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or None in entry:
            continue
        library, class_name = entry
        if not isinstance(library, str) or not isinstance(class_name, str):
            raise VramplanError(f"{repository.where(INDEX)}: {name} must name a library and a class, not {entry!r}")
        cls = component_class(library, class_name)
        if has_weights(cls):
            own = variant if variant in variants(repository, name) else None
            component, notes = _component(
                repository, name, library, class_name, pipeline, dtype=dtype, variant=own, allow_pickle=allow_pickle
            )
            yield replace(component, variant=own), notes


def _component(
    repository: Repository,
    name: str,
    library: str,
    class_name: str,
    pipeline: type,
    *,
    dtype: str | None,
    variant: str | None,
    allow_pickle: bool,
) -> tuple[Component, Sequence[str]]:
    read_config(repository, name)  # first, so that the error for a missing folder names its config
    stored = stored_weights(repository, name, variant)
    if stored is None and not allow_pickle:
        raise _no_weights_error(repository, name)
    stored_dtype = stored.dtype if stored else "float32"
    own_dtype = _COMPUTE_DTYPE if stored_dtype.startswith("float8") else stored_dtype
    module = weightless_component(repository, name, library, class_name, dtype or own_dtype, variant=variant)
    # pickles may be read whole; quantized weights are assumed to be the process's own memory once loaded
    converted = stored is None or (dtype or own_dtype) != stored_dtype or bool(stored.packed)
    component = describe_component(name, module, library=library, pipeline=pipeline, converted_at_load=converted)
    notes = [_disagreement(name, module, stored)]
    if own_dtype != stored_dtype and dtype is None:
        notes.append(
            f"{name}: its files are in {stored_dtype}, in which nothing is computed; it is loaded in {own_dtype}, and "
            f'`settings={{"weights.{name}": "layerwise_casting"}}` brings it to 8 bits again'
        )
    return component, [note for note in notes if note]


def read_config(repository: Repository, name: str) -> dict[str, Any]:
    """The configuration of a component."""
    return repository.read_json(f"{name}/config.json")


def weightless_component(
    repository: Repository, name: str, library: str, class_name: str, dtype: str, *, variant: str | None = None
) -> torch.nn.Module:
    """The saved component without data, as it would be loaded in this dtype; quantized if it was saved quantized.

    Raises:
        VramplanError: a part of it is missing or damaged, or its quantization is unknown.
    """
    config = read_config(repository, name)
    quantization = config.pop("quantization_config", None)
    module = _build(repository, name, library, class_name, config)
    if quantization is None:
        cast_as_loaded(module, dtype)
        return module
    stored = stored_weights(repository, name, variant)
    if stored is None or not stored.packed:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        by = f" by {method}" if method not in (None, "bitsandbytes", "torchao") else ""
        raise VramplanError(
            f"{repository.where(name)}: its weights are quantized{by}, not by bitsandbytes or torchao into safetensors "
            "files; load the pipeline and call vramplan.auto_configure(pipe)"
        )
    cast_as_loaded(module, stored.dtype if keeps_saved_dtype(module, stored.packed) else dtype)
    pack_layers(module, stored.packed)
    return module


def _build(
    repository: Repository, name: str, library: str, class_name: str, config: Mapping[str, Any]
) -> torch.nn.Module:
    """Build the component without weights. A class may raise anything on a wrong configuration: all becomes
    VramplanError."""
    try:
        return build_weightless(library, class_name, config)
    except VramplanError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise VramplanError(
            f"{repository.where(f'{name}/config.json')}: no {class_name} can be built from it ({reason})"
        ) from error


def _no_weights_error(repository: Repository, name: str) -> VramplanError:
    where, found = repository.where(name), variants(repository, name)
    if found:
        return VramplanError(f'{where} has weights of variant {", ".join(found)} only: pass `variant="{found[0]}"`')
    return VramplanError(f"{where} has no safetensors weights; pass `allow_pickle=True` for pickled ones you trust")


def _disagreement(name: str, module: torch.nn.Module, stored: StoredWeights | None) -> str | None:
    """A note if the files hold another number of elements than the class saves, or are pickles; else None."""
    if stored is None:
        return f"{name}: sizes are those of the class; its weights are pickles, which were not read"
    packed = _packed_tensors(module)
    expected = sum(tensor.numel() for tensor in tensors_of(module) if id(tensor) not in packed)
    unsaved = sum(tensor.numel() for tensor in _unsaved_tensors(module))
    if expected - unsaved == stored.elements:
        return None
    return (
        f"{name}: its files hold {stored.elements:,} elements ({format_bytes(stored.size_bytes)}), "
        f"{type(module).__name__} has {expected - unsaved:,}; the plan counts what will be loaded"
    )


def _packed_tensors(module: torch.nn.Module) -> frozenset[int]:
    """The ids of the tensors that quantized weights consist of."""
    from vramplan.pipeline.packed_linear import PackedLinear, weight_parts

    layers = (layer for layer in module.modules() if isinstance(layer, PackedLinear))
    return frozenset(id(part) for layer in layers for part in weight_parts(layer))


def _unsaved_tensors(module: torch.nn.Module) -> Iterable[torch.Tensor]:
    """The buffers that a class computes and does not save."""
    for child in module.modules():
        for name in child._non_persistent_buffers_set:
            buffer = child._buffers.get(name)
            if buffer is not None:
                yield buffer


def _weight_files(repository: Repository, name: str, variant: str | None) -> list[str]:
    """The safetensors files that `from_pretrained` would read: one file, or the shards named by an index.

    A variant comes before the last part of a name (diffusers 0.42 `_add_variant`).
    """
    files, infix = repository.names(name), f".{variant}" if variant else ""
    for stem in _STEMS:
        index = f"{stem}.safetensors.index{infix}.json"
        if index in files:
            return [f"{name}/{shard}" for shard in _shards(repository, name, index, files)]
        if f"{stem}{infix}.safetensors" in files:
            return [f"{name}/{stem}{infix}.safetensors"]
    return []


def _shards(repository: Repository, name: str, index: str, files: frozenset[str]) -> list[str]:
    where = repository.where(f"{name}/{index}")
    weight_map = repository.read_json(f"{name}/{index}").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise VramplanError(f"{where}: its weight_map does not name a file for every tensor")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise VramplanError(f"{where} names {shard[:200]!r}, which is not a safetensors file in the same folder")
        if shard not in files:
            raise VramplanError(f"{where} names {shard}, which is missing")
    return shards
