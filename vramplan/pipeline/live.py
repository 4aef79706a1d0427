"""Describe a live pipeline."""

from __future__ import annotations

from typing import Any

from vramplan.pipeline.classes import class_facts
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.modules import modules_of
from vramplan.pipeline.prompt import encode_refusal
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.pipeline.uses import uses_of


def spec_from_pipeline(pipe: Any) -> PipelineSpec:
    """The description of a live `DiffusionPipeline`, hooks and devices included. Nothing is changed."""
    cls = type(pipe)
    components = tuple(
        describe_component(name, module, pipeline=cls, live=True) for name, module in modules_of(pipe).items()
    )
    return assemble(cls, components, source="live", pipe=pipe)


def assemble(
    cls: type,
    components: tuple[Component, ...],
    *,
    source: str,
    pipe: Any = None,
    family: str | None = None,
    notes: tuple[str, ...] = (),
) -> PipelineSpec:
    """The spec of these components in a pipeline of this class, instance attributes first."""
    facts = class_facts(cls)
    names = {component.name for component in components}
    sequence = facts.sequence
    device_map = getattr(pipe, "hf_device_map", None)
    return PipelineSpec(
        class_name=cls.__name__,
        source=source,
        components=components,
        sequence=None if sequence is None else tuple(name for name in sequence if name in names),
        excluded=frozenset(getattr(pipe or cls, "_exclude_from_cpu_offload", ())) & names,
        uses=uses_of(components, facts),
        video=facts.video,
        sound=facts.sound,
        frees_hooks=facts.frees_hooks,
        device_map=_several_devices(device_map),
        encode_refusal=encode_refusal(cls),
        family=family,
        notes=notes,
    )


def _several_devices(device_map: Any) -> dict[str, str] | None:
    """The map, where it is one over several devices: what diffusers calls device-mapped."""
    if not isinstance(device_map, dict) or len(device_map) <= 1:
        return None
    return {str(name): str(device) for name, device in device_map.items()}
