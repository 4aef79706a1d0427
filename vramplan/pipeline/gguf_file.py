"""Read from a GGUF file's header which weights stay in blocks when diffusers loads it, and their types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.errors import VramplanError
from vramplan.pipeline.build import build_weightless, component_class

if TYPE_CHECKING:
    import torch

_MAGIC = b"GGUF"
_FILES_KEPT = 16


def block_types(path: Path, library: str, class_name: str, config: Mapping[str, Any]) -> Mapping[str, str]:
    """The weights of linear layers that stay in blocks when the file is loaded into this class, each with ggml's name
    of its type (`Q4_K`). All other tensors are plain, and take the dtype the component is loaded in.

    Raises:
        VramplanError: the file is missing or damaged, or its tensors are not those of the class.
    """
    check_file(path)
    about = path.stat()
    text = json.dumps(dict(config), sort_keys=True, default=str)
    return _block_types(path, about.st_mtime_ns, about.st_size, library, class_name, text)


def check_file(path: Path) -> None:
    """Raise VramplanError unless this is a GGUF file whose name ends in `.gguf`, which diffusers requires."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise VramplanError(f"{path}: cannot be read ({error.strerror or error})") from error
    if magic != _MAGIC:
        raise VramplanError(f"{path} is not a GGUF file: it does not begin with {_MAGIC.decode()}")
    if path.suffix != ".gguf":
        raise VramplanError(f"{path}: diffusers reads a GGUF file only under a name that ends in .gguf")


@lru_cache(maxsize=_FILES_KEPT)
def _block_types(path: Path, modified: int, size: int, library: str, class_name: str, config: str) -> Mapping[str, str]:
    cls = component_class(library, class_name)
    module = build_weightless(library, class_name, json.loads(config))
    tensors = convert_names(path, cls, module, _tensors(path), json.loads(config))
    check_names(path, module, tensors)
    kept = frozenset(getattr(module, "_keep_in_fp32_modules", None) or ())
    found = {}
    for name, tensor in tensors.items():
        kind = getattr(tensor, "quant_type", None)
        if kind is not None and kept.isdisjoint(name.split(".")):
            _check_linear(path, module, name, kind.name)
            found[name] = kind.name
    return found


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The file's tensors without data, as diffusers' `load_gguf_checkpoint` makes them: `GGUFParameter` for blocks.

    The header is not validated by the gguf package, which raises many kinds of errors on a damaged one.
    """
    import torch
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter
    from gguf import GGMLQuantizationType, GGUFReader

    plain = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16}
    found: dict[str, torch.Tensor] = {}
    try:
        for tensor in GGUFReader(path).tensors:
            kind, shape = tensor.tensor_type, tuple(int(length) for length in tensor.data.shape)
            if kind in plain:
                found[tensor.name] = torch.empty(shape, dtype=plain[kind], device="meta")
            elif kind in SUPPORTED_GGUF_QUANT_TYPES:
                data = torch.empty(shape, dtype=torch.uint8, device="meta")
                found[tensor.name] = GGUFParameter(data, quant_type=kind)
            else:
                raise VramplanError(f"{path}: {tensor.name} is of type {kind.name}, which diffusers does not unpack")
    except (ValueError, LookupError, TypeError, ArithmeticError, OSError, MemoryError, RecursionError) as error:
        raise VramplanError(f"{path}: a damaged GGUF file ({error}); download or make it again") from error
    return found


def convert_names(
    path: object, cls: type, module: torch.nn.Module, tensors: dict[str, torch.Tensor], config: Mapping[str, Any]
) -> Mapping[str, torch.Tensor]:
    """Rename the tensors to the names in the class, as `from_single_file` does (diffusers 0.42).

    Raises:
        VramplanError: the tensors are not those of the class; the message names `path`.
    """
    from diffusers.loaders import single_file_model

    mapped = single_file_model._get_single_file_loadable_mapping_class(cls)
    if mapped is None:
        raise VramplanError(f"diffusers loads no {cls.__name__} from a single file")
    if not single_file_model._should_convert_state_dict_to_diffusers(module.state_dict(), tensors):
        return tensors
    count = len(tensors)
    convert = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[mapped]["checkpoint_mapping_fn"]
    try:
        made: Mapping[str, torch.Tensor] = convert(checkpoint=tensors, config=config)
    except Exception as error:  # each class has its own function, and none expects foreign names
        raise VramplanError(
            f"{path} does not hold a {cls.__name__}: diffusers cannot convert its {count} tensors "
            f"({type(error).__name__}: {error})"
        ) from error
    return made


def check_names(path: object, module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise VramplanError if the file lacks a tensor of the class, or has one in another shape."""
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise VramplanError(
            f"{path} does not hold this {type(module).__name__}: {len(missing)} of its {len(wanted)} tensors are not "
            f"in the file, {missing[0]} among them"
        )
    for name, tensor in wanted.items():
        shape = tuple(getattr(tensors[name], "quant_shape", tensors[name].shape))
        if shape != tuple(tensor.shape):
            raise VramplanError(
                f"{path} does not hold this {type(module).__name__}: {name} is {list(shape)} in the file, "
                f"{list(tensor.shape)} in the class"
            )


def _check_linear(path: Path, module: torch.nn.Module, name: str, kind: str) -> None:
    import torch

    layer, _, tensor = name.rpartition(".")
    if tensor != "weight" or not isinstance(module.get_submodule(layer), torch.nn.Linear):
        raise VramplanError(
            f"{path}: {name} is of type {kind}, and no weight of a linear layer: diffusers unpacks no other"
        )
