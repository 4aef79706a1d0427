"""Encode first: the text encoders are loaded, the prompt is encoded, and they are dropped before the rest is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from vramplan.hardware.types import Accelerator
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.strategies.base import Axis, Hold, Placement, Quality, WithoutOptions
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.resident import Resident


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeFirst(WithoutOptions):
    """The encoder is on the device alone, and dropped after encoding.

    With `leaf` it stays in RAM and comes to the device a leaf at a time, for an encoder larger than the device.
    """

    name: ClassVar[str] = "encode_first"
    axis: ClassVar[Axis] = "placement"
    stock: ClassVar[bool] = False
    quality: ClassVar[Quality] = "lossless"
    whole_pipeline: ClassVar[bool] = False
    freed: ClassVar[bool] = True
    leaves: ClassVar[tuple[str, ...]] = GroupOffload.leaves

    leaf: bool = False

    @property
    def direct(self) -> bool:
        """True without `leaf`."""
        return not self.leaf

    @property
    def _while_encoding(self) -> Placement:
        """The placement of the encoder while it encodes."""
        return GroupOffload(type="leaf") if self.leaf else Resident()

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """Whole, and a leaf at a time; for text encoders only."""
        return (cls(), cls(leaf=True)) if component.role == "text_encoder" else ()

    def refusal(self, component: Component, spec: PipelineSpec, accelerator: Accelerator | None) -> str | None:
        """Refuse a loaded pipeline, one that takes no encoded prompt, and encoders that `leaf` cannot offload."""
        if component.role != "text_encoder":
            return f"it is for text encoders, and {component.name} is none"
        if component.device is not None:
            return "the pipeline is loaded already, encoders too: plan for its folder and load it with `vramplan apply`"
        if spec.encode_refusal is not None:
            return spec.encode_refusal
        if accelerator is None and self.leaf:
            return "leaf=true needs an accelerator, and none was found"
        return self._while_encoding.refusal(component, spec, accelerator)

    def hold(self, component: Component, spec: PipelineSpec) -> Hold:
        """The hold while encoding; the files are read again for each prompt."""
        return replace(self._while_encoding.hold(component, spec), read_bytes=component.weight_bytes)

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Apply the placement for encoding. The loader of the other components drops the encoders."""
        self._while_encoding.apply(pipe, names, device)

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Remove the hooks."""
        self._while_encoding.remove(pipe, names)

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """The code of the placement while encoding."""
        return self._while_encoding.code(names, device)
