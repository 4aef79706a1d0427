"""Encode first: the text encoders are loaded alone, the prompt is encoded, and they go before all else is loaded."""

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
    """The encoder is on the device while nothing else is, then nowhere.

    With `leaf` it stays in RAM until then and comes to the device a leaf at a time: for one larger than the device.
    """

    name: ClassVar[str] = "encode_first"
    axis: ClassVar[Axis] = "placement"
    quality: ClassVar[Quality] = "lossless"
    whole_pipeline: ClassVar[bool] = False
    freed: ClassVar[bool] = True
    leaves: ClassVar[tuple[str, ...]] = GroupOffload.leaves

    leaf: bool = False

    @property
    def direct(self) -> bool:
        """Only whole."""
        return not self.leaf

    @property
    def _meanwhile(self) -> Placement:
        """Where the encoder is while it encodes."""
        return GroupOffload(type="leaf") if self.leaf else Resident()

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """Whole, and a leaf at a time; of a text encoder only."""
        return (cls(), cls(leaf=True)) if component.role == "text_encoder" else ()

    def refusal(self, component: Component, spec: PipelineSpec, accelerator: Accelerator | None) -> str | None:
        """A pipeline that is loaded already, one that does not take its prompt encoded, and what `leaf` cannot do."""
        if component.role != "text_encoder":
            return f"it is for text encoders, and {component.name} is none"
        if component.device is not None:
            return "the pipeline is loaded already, encoders too: plan for its folder and load it with `vramplan apply`"
        if spec.encode_refusal is not None:
            return spec.encode_refusal
        if accelerator is None and self.leaf:
            return "leaf=true needs an accelerator, and none was found"
        return self._meanwhile.refusal(component, spec, accelerator)

    def hold(self, component: Component, spec: PipelineSpec) -> Hold:
        """As where it is meanwhile; its files are read anew for each prompt."""
        return replace(self._meanwhile.hold(component, spec), read_bytes=component.weight_bytes)

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Put the encoders where they encode. To drop them again is for whoever loads the rest."""
        self._meanwhile.apply(pipe, names, device)

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Take the hooks off."""
        self._meanwhile.remove(pipe, names)

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """Where it is meanwhile."""
        return self._meanwhile.code(names, device)
