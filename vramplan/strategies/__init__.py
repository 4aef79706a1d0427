"""The strategies, one file each, and their axes. `AXES` is the only list of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vramplan.strategies.attention_backend import AttentionBackend
from vramplan.strategies.attention_slicing import AttentionSlicing
from vramplan.strategies.base import Axis, Decode, Execution, Placement, Weights
from vramplan.strategies.bitsandbytes import Bitsandbytes
from vramplan.strategies.compile_repeated_blocks import CompileRepeatedBlocks
from vramplan.strategies.decode_chunk_size import DecodeChunkSize
from vramplan.strategies.encode_first import EncodeFirst
from vramplan.strategies.framewise_decoding import FramewiseDecoding
from vramplan.strategies.gguf import Gguf
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.layerwise_casting import LayerwiseCasting
from vramplan.strategies.model_cpu_offload import ModelCpuOffload
from vramplan.strategies.resident import Resident
from vramplan.strategies.sequential_cpu_offload import SequentialCpuOffload
from vramplan.strategies.torchao import Torchao
from vramplan.strategies.vae_slicing import VaeSlicing
from vramplan.strategies.vae_tiling import VaeTiling
from vramplan.strategies.weight_streaming import WeightStreaming

WEIGHTS: tuple[type[Weights], ...] = (LayerwiseCasting, Torchao, Bitsandbytes, Gguf)
PLACEMENTS: tuple[type[Placement], ...] = (
    Resident,
    ModelCpuOffload,
    WeightStreaming,
    GroupOffload,
    EncodeFirst,
    SequentialCpuOffload,
)
DECODES: tuple[type[Decode], ...] = (VaeSlicing, VaeTiling, FramewiseDecoding, DecodeChunkSize)


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisRow:
    """One axis of a candidate, with its strategies, each of which implements the protocol `kind`.

    A setting is for one component; on an axis that is not `by_component` the pipeline takes several settings at once.
    `nothing` is the word for no setting, empty if every component needs one. `order` is the position in applying.
    """

    name: Axis
    kind: type
    strategies: tuple[type[Any], ...]
    order: int
    by_component: bool = True
    nothing: str = "plain"
    question: str

    @property
    def keys(self) -> tuple[str, ...]:
        """The forms of the key in `AXIS.COMPONENT=SETTING`."""
        one = (f"{self.name}.COMPONENT",) if self.by_component else ()
        return one if one and self.nothing else (self.name, *one)

    def takes(self, key: str, text: str) -> bool:
        """Whether `KEY=TEXT` is valid on this axis; the word for no setting needs no component."""
        if not self.by_component or key == self.name in self.keys:
            return key == self.name
        return bool(key.partition(".")[2] or (self.nothing and text == self.nothing))


AXES: Mapping[Axis, AxisRow] = {
    row.name: row
    for row in (
        AxisRow(
            name="weights", kind=Weights, strategies=WEIGHTS, order=1, nothing="stored",
            question="how many bytes a component weighs",
        ),
        AxisRow(
            name="placement", kind=Placement, strategies=PLACEMENTS, order=3, nothing="",
            question="how much of a component is on the device, and when",
        ),
        AxisRow(
            name="decode", kind=Decode, strategies=DECODES, order=0, by_component=False,
            question="how much of a picture the VAE works on at a time",
        ),
        AxisRow(
            name="attention", kind=Execution, strategies=(AttentionSlicing, AttentionBackend), order=2,
            question="by which kernels the attention of a component runs",
        ),
        AxisRow(
            name="compile", kind=Execution, strategies=(CompileRepeatedBlocks,), order=4,
            question="whether the blocks of a component are compiled",
        ),
    )
}  # fmt: skip
REGISTRY: tuple[type[Any], ...] = tuple(cls for row in AXES.values() for cls in row.strategies)
EXECUTIONS: tuple[type[Execution], ...] = tuple(cls for cls in REGISTRY if AXES[cls.axis].kind is Execution)

__all__ = [
    "AXES", "DECODES", "EXECUTIONS", "PLACEMENTS", "REGISTRY", "WEIGHTS",
    "AxisRow", "Decode", "Execution", "Placement", "Weights",
]  # fmt: skip
