"""The levers, one file each. The registry below is the only list of them."""

from __future__ import annotations

from vramplan.strategies.attention_backend import AttentionBackend
from vramplan.strategies.attention_slicing import AttentionSlicing
from vramplan.strategies.base import Decode, Execution, Placement, Weights
from vramplan.strategies.bitsandbytes import Bitsandbytes
from vramplan.strategies.compile_repeated_blocks import CompileRepeatedBlocks
from vramplan.strategies.decode_chunk_size import DecodeChunkSize
from vramplan.strategies.encode_first import EncodeFirst
from vramplan.strategies.framewise_decoding import FramewiseDecoding
from vramplan.strategies.gguf import Gguf
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.layerwise_casting import LayerwiseCasting
from vramplan.strategies.model_cpu_offload import ModelCpuOffload
from vramplan.strategies.partial_residency import PartialResidency
from vramplan.strategies.resident import Resident
from vramplan.strategies.sequential_cpu_offload import SequentialCpuOffload
from vramplan.strategies.torchao import Torchao
from vramplan.strategies.vae_slicing import VaeSlicing
from vramplan.strategies.vae_tiling import VaeTiling

WEIGHTS: tuple[type[Weights], ...] = (LayerwiseCasting, Torchao, Bitsandbytes, Gguf)
PLACEMENTS: tuple[type[Placement], ...] = (
    Resident,
    ModelCpuOffload,
    PartialResidency,
    GroupOffload,
    EncodeFirst,
    SequentialCpuOffload,
)
DECODES: tuple[type[Decode], ...] = (VaeSlicing, VaeTiling, FramewiseDecoding, DecodeChunkSize)
EXECUTIONS: tuple[type[Execution], ...] = (AttentionSlicing, AttentionBackend, CompileRepeatedBlocks)
Strategy = type[Weights] | type[Placement] | type[Decode] | type[Execution]
REGISTRY: tuple[Strategy, ...] = (*WEIGHTS, *PLACEMENTS, *DECODES, *EXECUTIONS)

__all__ = ["DECODES", "EXECUTIONS", "PLACEMENTS", "REGISTRY", "WEIGHTS", "Decode", "Execution", "Placement", "Weights"]
