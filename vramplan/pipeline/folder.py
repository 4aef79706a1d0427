"""Describe a saved pipeline, from its configurations and safetensors headers: in a local folder, or on the hub.

No weight is read: a header says the name, dtype and shape of every tensor in the first kilobytes of a file.
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
from vramplan.pipeline.live import assemble
from vramplan.pipeline.repository import FolderRepository, Repository
from vramplan.pipeline.saved import SavedLayer, keeps_saved_dtype, layer_of, packed_layers, put_packed
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.units import format_bytes

if TYPE_CHECKING:
    import torch

INDEX = "model_index.json"
# What diffusers and transformers call their weights.
_STEMS = ("diffusion_pytorch_model", "model")
# What weights of 8 bits are multiplied with again, as others than diffusers (0.42) write them beside them.
_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv", "scaled_fp8")
# What weights are loaded in whose own dtype nothing is computed in.
_COMPUTED = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """What the weight files of one component hold: elements and bytes, and the dtype most bytes have.

    Of what is `packed`, layers with quantized weights, only the bytes count.
    """

    elements: int
    size_bytes: int
    dtype: str
    packed: Mapping[str, SavedLayer]


def spec_from_folder(folder: Path, **options: Any) -> PipelineSpec:
    """The description of the pipeline in a local folder; `options` are those of `spec_from_repository`."""
    return spec_from_repository(FolderRepository(folder), **options)


def spec_from_repository(
    repository: Repository, *, dtype: str | None = None, variant: str | None = None, allow_pickle: bool = False
) -> PipelineSpec:
    """The description of a saved pipeline, as loading it with `dtype` would make it.

    Without `dtype` each component keeps the dtype it is stored in, so that loading changes nothing, unless that is one
    of 8 bits, in which nothing is computed. A component that has no files of the `variant` is loaded without one, as
    diffusers does.

    Raises:
        VramplanError: not a saved pipeline, a part of it missing or damaged, a class unknown here, or
            weights that are pickles while `allow_pickle` is off. UsageError: no component has that variant.
    """
    index = read_index(repository)
    cls = pipeline_class(repository, index)
    parts = tuple(_components(repository, index, cls, dtype=dtype, variant=variant, allow_pickle=allow_pickle))
    components = tuple(component for component, _ in parts)
    if variant is not None and not any(component.variant for component in components):
        found = sorted({name for component in components for name in variants(repository, component.name)})
        there = f"it has {', '.join(found)}" if found else "it has none"
        raise UsageError(f"{repository.where('')}: no component has weights of variant {variant!r}: {there}")
    notes = tuple(note for _, own in parts for note in own)
    return assemble(cls, components, source=repository.source, notes=notes)


def read_index(repository: Repository) -> Mapping[str, Any]:
    """The repository's `model_index.json`.

    Raises:
        VramplanError: there is none, it is damaged, or names a component that no folder can have.
    """
    files = repository.names("")
    if INDEX not in files:
        single = min((name for name in files if name.endswith(".safetensors")), default=None)
        advice = f"; if its {single} is a checkpoint in one file, write {repository.where(single)}" if single else ""
        raise VramplanError(f"{repository.where('')} has no {INDEX}: it is not a saved diffusers pipeline{advice}")
    index = repository.read_json(INDEX)
    for name in index:
        if not name.isidentifier():
            raise VramplanError(f"{repository.where(INDEX)}: {name!r} is no name of a component")
    return index


def pipeline_class(repository: Repository, index: Mapping[str, Any]) -> type:
    """The diffusers class the index names. Raises VramplanError for a class that is not diffusers' own."""
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
    """What a component's safetensors files hold, read from their headers; None where there are none.

    Raises:
        VramplanError: a file that the index names is missing, or a header that cannot be read.
    """
    files = _weight_files(repository, name, variant)
    if not files:
        return None
    headers = [repository.header(path) for path in files]
    tensors = [tensor for found, _ in headers for tensor in found]
    scaled = next((tensor.name for tensor in tensors if tensor.name.endswith(_SCALES)), None)
    if scaled is not None and "quantization_config" not in read_config(repository, name):
        raise VramplanError(
            f"{repository.where(name)}: its weights are of 8 bits with scales beside them ({scaled}), which diffusers "
            "would leave out: take the checkpoint it was made from"
        )
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


def variants(repository: Repository, name: str) -> list[str]:
    """The variants that a component's safetensors files come in, sorted."""
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
    read_config(repository, name)  # what a missing folder lacks first
    stored = stored_weights(repository, name, variant)
    if stored is None and not allow_pickle:
        raise _without_weights(repository, name)
    stored_dtype = stored.dtype if stored else "float32"
    own_dtype = _COMPUTED if stored_dtype.startswith("float8") else stored_dtype
    module = weightless_component(repository, name, library, class_name, dtype or own_dtype, variant=variant)
    # pickles may be read whole; what loading makes of quantized weights is taken to be the process's own memory
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
    """The component in its folder as loading it in this dtype would make it, without data; quantized where it was
    saved so.

    Raises:
        VramplanError: a part of it is missing or damaged, or quantized in a way that the files do not tell.
    """
    config = read_config(repository, name)
    quantization = config.pop("quantization_config", None)
    module = _built(repository, name, library, class_name, config)
    if quantization is None:
        cast_as_loaded(module, dtype)
        return module
    stored = stored_weights(repository, name, variant)
    if stored is None or not stored.packed:
        told = quantization.get("quant_method") if isinstance(quantization, dict) else None
        by = f" by {told}" if told not in (None, "bitsandbytes", "torchao") else ""
        raise VramplanError(
            f"{repository.where(name)}: its weights are quantized{by}, not by bitsandbytes or torchao into safetensors "
            "files; load the pipeline and call vramplan.auto_configure(pipe)"
        )
    cast_as_loaded(module, stored.dtype if keeps_saved_dtype(module, stored.packed) else dtype)
    put_packed(module, stored.packed)
    return module


def _built(
    repository: Repository, name: str, library: str, class_name: str, config: Mapping[str, Any]
) -> torch.nn.Module:
    """The component without weights. What a wrong configuration makes a class raise is anybody's guess."""
    try:
        return build_weightless(library, class_name, config)
    except VramplanError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise VramplanError(
            f"{repository.where(f'{name}/config.json')}: no {class_name} can be built from it ({reason})"
        ) from error


def _without_weights(repository: Repository, name: str) -> VramplanError:
    where, found = repository.where(name), variants(repository, name)
    if found:
        return VramplanError(f'{where} has weights of variant {", ".join(found)} only: pass `variant="{found[0]}"`')
    return VramplanError(f"{where} has no safetensors weights; pass `allow_pickle=True` for pickled ones you trust")


def _disagreement(name: str, module: torch.nn.Module, stored: StoredWeights | None) -> str | None:
    """A note, where the files hold another number of elements than the class has saved tensors."""
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


def _weight_files(repository: Repository, name: str, variant: str | None) -> list[str]:
    """The safetensors files `from_pretrained` would read: one file, or the shards its index names.

    A variant stands before the last part of a name (diffusers 0.42 `_add_variant`).
    """
    there, infix = repository.names(name), f".{variant}" if variant else ""
    for stem in _STEMS:
        index = f"{stem}.safetensors.index{infix}.json"
        if index in there:
            return [f"{name}/{shard}" for shard in _shards(repository, name, index, there)]
        if f"{stem}{infix}.safetensors" in there:
            return [f"{name}/{stem}{infix}.safetensors"]
    return []


def _shards(repository: Repository, name: str, index: str, there: frozenset[str]) -> list[str]:
    where = repository.where(f"{name}/{index}")
    weight_map = repository.read_json(f"{name}/{index}").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise VramplanError(f"{where}: its weight_map does not name a file for every tensor")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise VramplanError(f"{where} names {shard[:200]!r}, which is no safetensors file beside it")
        if shard not in there:
            raise VramplanError(f"{where} names {shard}, which is missing")
    return shards
