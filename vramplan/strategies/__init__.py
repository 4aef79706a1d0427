"""The levers, one file each. The registry below is the only list of them."""

from __future__ import annotations

from vramplan.strategies.base import Decode, Placement, Weights
from vramplan.strategies.bitsandbytes import Bitsandbytes
from vramplan.strategies.decode_chunk_size import DecodeChunkSize
from vramplan.strategies.encode_first import EncodeFirst
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.layerwise_casting import LayerwiseCasting
from vramplan.strategies.model_cpu_offload import ModelCpuOffload
from vramplan.strategies.partial_residency import PartialResidency
from vramplan.strategies.resident import Resident
from vramplan.strategies.sequential_cpu_offload import SequentialCpuOffload
from vramplan.strategies.torchao import Torchao
from vramplan.strategies.vae_slicing import VaeSlicing
from vramplan.strategies.vae_tiling import VaeTiling

WEIGHTS: tuple[type[Weights], ...] = (LayerwiseCasting, Torchao, Bitsandbytes)
PLACEMENTS: tuple[type[Placement], ...] = (
    Resident,
    ModelCpuOffload,
    PartialResidency,
    GroupOffload,
    EncodeFirst,
    SequentialCpuOffload,
)
DECODES: tuple[type[Decode], ...] = (VaeSlicing, VaeTiling, DecodeChunkSize)
REGISTRY: tuple[type[Weights] | type[Placement] | type[Decode], ...] = (*WEIGHTS, *PLACEMENTS, *DECODES)

__all__ = ["DECODES", "PLACEMENTS", "REGISTRY", "WEIGHTS", "Decode", "Placement", "Weights"]
