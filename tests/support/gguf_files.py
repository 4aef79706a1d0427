"""Real GGUF files, written with the gguf package from a module's own weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch

Kind = gguf.GGMLQuantizationType


def kind_for(kind: Kind) -> Callable[[str, torch.Tensor], Kind]:
    """This type for the matrices that it has whole blocks for, 32 bits for all else, as files in the wild have it."""
    block = gguf.GGML_QUANT_SIZES[kind][0]

    def kind_of(name: str, tensor: torch.Tensor) -> Kind:
        weight = name.endswith(".weight") and tensor.ndim == 2
        return kind if weight and tensor.shape[1] % block == 0 else Kind.F32

    return kind_of


def write_gguf(
    path: Path, tensors: Mapping[str, torch.Tensor], kinds: Callable[[str, torch.Tensor], Kind], arch: str = "flux"
) -> Path:
    """These tensors in a file, each of the type that `kinds` says."""
    writer = gguf.GGUFWriter(path, arch)
    for name, tensor in tensors.items():
        kind = kinds(name, tensor)
        writer.add_tensor(name, blocks(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(values: np.ndarray, kind: Kind) -> np.ndarray:
    """The values rounded to this type. The package rounds to no K-quants: of these, blocks of small random numbers."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows = (*values.shape[:-1], values.shape[-1] // block * size)
        return np.random.default_rng(0).integers(0, 32, rows, dtype=np.uint8)
