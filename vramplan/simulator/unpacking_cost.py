"""What layers with packed weights take while they run, beside what plain ones do: on stand-ins, layer by layer.

So a quantized pipeline has a price without a simulation of its own. The bytes are an upper bound: no layer takes more
than the largest of them, at whatever moment of the call it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from vramplan.pipeline.packed_linear import PackedLinear
from vramplan.pipeline.types import Use
from vramplan.planner.footprint import Estimate, Footprint, Work
from vramplan.simulator.allocator import CachingAllocator
from vramplan.simulator.engine import Engine
from vramplan.simulator.kernels import Kernels
from vramplan.simulator.ledger import Cost, Ledger
from vramplan.simulator.parts import simulated_copy
from vramplan.simulator.run import allocate_cublas_workspace, simulated_devices
from vramplan.simulator.types import Simulation
from vramplan.strategies.base import Decode


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpackingCost:
    """One forward of a component with packed weights against a plain one: the most bytes more that a layer takes, and
    what all of them together read, write and launch more."""

    extra_bytes: int
    traffic_bytes: int
    launches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpackingFootprint:
    """The needs of a pipeline with plain weights, and what unpacking takes beside them, by component."""

    plain: Footprint
    parts: Mapping[str, UnpackingCost]

    @property
    def workspace_bytes(self) -> int:
        """That of the plain pipeline."""
        return self.plain.workspace_bytes

    def activation(self, use: Use, decode: Sequence[Decode]) -> Estimate:
        """That of the plain pipeline, and the largest layer's unpacking."""
        found, part = self.plain.activation(use, decode), self.parts.get(use.component)
        if part is None:
            return found
        more = part.extra_bytes
        return replace(found, size_bytes=found.size_bytes + more, reserved_bytes=found.reserved_bytes + more)

    def work(self, use: Use, decode: Sequence[Decode]) -> Work:
        """That of the plain pipeline, and unpacking each layer once a forward."""
        found, part = self.plain.work(use, decode), self.parts.get(use.component)
        if part is None:
            return found
        traffic = found.traffic_bytes + part.traffic_bytes * found.forwards
        return replace(found, traffic_bytes=traffic, launches=found.launches + part.launches * found.forwards)


def unpacking_cost(name: str, module: torch.nn.Module, dtype: torch.dtype, plain: Simulation) -> UnpackingCost:
    """What one forward of this module takes more than with plain weights of `dtype`, on as many rows as `plain` had
    in each layer; on one, in layers it did not see."""
    flops = {item.name: item.flops for item in plain.modules}
    forwards = max(1, sum(use.forwards for use in plain.uses if use.component == name))
    measured: dict[tuple[str, int, int, bool, int], UnpackingCost] = {}
    costs = []
    for path, layer in module.named_modules():
        if isinstance(layer, PackedLinear):
            products = flops.get(f"{name}.{path}", 0) / forwards
            rows = max(1, round(products / (2 * layer.in_features * layer.out_features)))
            key = (layer.kind, layer.in_features, layer.out_features, layer.bias is None, rows)
            if key not in measured:
                measured[key] = _packed_cost(layer, rows, dtype)
            costs.append(measured[key])
        elif _is_cast(layer):
            costs.append(_cast_cost(layer, dtype.itemsize))
    return UnpackingCost(
        extra_bytes=max((cost.extra_bytes for cost in costs), default=0),
        traffic_bytes=sum(cost.traffic_bytes for cost in costs),
        launches=sum(cost.launches for cost in costs),
    )


def _is_cast(layer: torch.nn.Module) -> bool:
    registry = getattr(layer, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("layerwise_casting") is not None


def _cast_cost(layer: torch.nn.Module, size: int) -> UnpackingCost:
    """A layer that is cast to `size` bytes a weight before it runs, and back afterwards."""
    tensors = list(layer.parameters())
    count = sum(tensor.numel() for tensor in tensors)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return UnpackingCost(
        extra_bytes=max(0, count * size - stored),
        traffic_bytes=2 * (stored + count * size),
        launches=2 * len(tensors),
    )


def _packed_cost(layer: PackedLinear, rows: int, dtype: torch.dtype) -> UnpackingCost:
    """A layer on so many rows, packed against plain."""
    columns, bias = layer.in_features, layer.bias is not None
    ledger = Ledger(CachingAllocator())
    engine = Engine(ledger, Kernels())
    with simulated_devices(engine):
        linear = torch.nn.Linear(columns, layer.out_features, bias=bias, dtype=dtype, device="meta")
        plain = simulated_copy(linear, engine)
        assert isinstance(plain, torch.nn.Linear)
        given = torch.empty((rows, columns), dtype=dtype, device="cuda:0")
        allocate_cublas_workspace()
        packed = layer.same_kind(plain)
        taken = [_run_layer(made.to("cuda:0"), given, ledger) for made in (plain, packed)]
        engine.kernels.release()
    (bytes_before, before), (bytes_after, after) = taken
    return UnpackingCost(
        extra_bytes=max(0, bytes_after - bytes_before),
        traffic_bytes=max(0, after.traffic_bytes - before.traffic_bytes),
        launches=max(0, after.launches - before.launches),
    )


def _run_layer(layer: torch.nn.Module, given: torch.Tensor, ledger: Ledger) -> tuple[int, Cost]:
    """The most bytes that a forward allocates, and what it computes."""
    allocator = ledger.allocator
    ledger.costs.clear()
    start = allocator.peak_allocated_bytes = allocator.allocated_bytes
    layer(given)
    return allocator.peak_allocated_bytes - start, ledger.cost
