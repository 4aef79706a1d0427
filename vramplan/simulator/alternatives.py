"""A pipeline with other weights, quantized for instance: its components and their memory needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from vramplan.pipeline.build import weightless_copy
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.dtypes import torch_dtype
from vramplan.pipeline.quantization import mark_quantized
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.planner.footprint import Footprint
from vramplan.strategies.base import AtLoad, Weights

if TYPE_CHECKING:
    import torch

    from vramplan.simulator.model import SimulatedModel
    from vramplan.simulator.types import Simulation
    from vramplan.simulator.unpacking_cost import UnpackingCost

# The fields of a component that a weights setting changes: its size, and how it can be split.
_SIZE_FIELDS = ("weight_bytes", "dtype_bytes", "geometry")


class Alternatives:
    """The alternatives for one model's weights. Each component is built and measured once per setting."""

    def __init__(self, model: SimulatedModel) -> None:
        self.model = model
        self._modules: dict[tuple[str, Weights], torch.nn.Module] = {}
        self._components: dict[tuple[str, Weights], Component] = {}
        self._costs: dict[tuple[str, Weights], UnpackingCost] = {}

    def spec(self, weights: Mapping[str, Weights]) -> PipelineSpec:
        """The pipeline under these settings."""
        spec = self.model.spec
        light = [
            self._component(component, weights[component.name]) if component.name in weights else component
            for component in spec.components
        ]
        return replace(spec, components=tuple(light))

    def footprint(self, weights: Mapping[str, Weights], plain: Footprint, simulation: Simulation) -> Footprint:
        """The memory needs of the pipeline with these weights settings: those of the pipeline as stored (`plain`), plus
        the cost of unpacking its weights on the shapes of that `simulation`."""
        from vramplan.simulator.unpacking_cost import UnpackingFootprint

        parts = {name: self._unpacking_cost(name, setting, simulation) for name, setting in weights.items()}
        return UnpackingFootprint(plain=plain, parts=parts)

    def _component(self, component: Component, setting: Weights) -> Component:
        key = (component.name, setting)
        if key not in self._components:
            other = describe_component(component.name, self._module(*key))
            sizes = {field: getattr(other, field) for field in _SIZE_FIELDS}
            light = _with_load_bytes(replace(component, **sizes), setting, component.weight_bytes)
            self._components[key] = mark_quantized(light, other.quantized)
        return self._components[key]

    def _unpacking_cost(self, name: str, setting: Weights, simulation: Simulation) -> UnpackingCost:
        from vramplan.simulator.unpacking_cost import unpacking_cost

        key = (name, setting)
        if key not in self._costs:
            dtype = torch_dtype(self.model.spec.component(name).dtype)
            self._costs[key] = unpacking_cost(name, self._module(*key), dtype, simulation)
        return self._costs[key]

    def _module(self, name: str, setting: Weights) -> torch.nn.Module:
        key = (name, setting)
        if key not in self._modules:
            self._modules[key] = converted_copy(self.model.parts.modules[name], setting)
        return self._modules[key]


def _with_load_bytes(light: Component, setting: Weights, stored_bytes: int) -> Component:
    """The component with the bytes it takes in RAM before conversion: those of its stored weights, or those of its
    file, which diffusers reads whole (0.42, `load_gguf_checkpoint`)."""
    source = setting.source if isinstance(setting, AtLoad) else None
    if source is None:
        return replace(light, cast_from_bytes=stored_bytes)
    return replace(light, cast_from_bytes=source.stat().st_size, converted_at_load=True)


def converted_copy(module: torch.nn.Module, setting: Weights) -> torch.nn.Module:
    """A weightless copy of the module, with a weights setting applied."""
    copy = weightless_copy(module)
    setting.lighten(copy)
    return copy
