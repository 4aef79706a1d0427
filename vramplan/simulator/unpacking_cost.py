"""Measure the extra cost of layers with packed weights over plain ones, layer by layer, on stand-ins.

This prices a quantized pipeline without a simulation of its own. The bytes are an upper bound: at any moment of the
call, a layer takes at most those of the largest one.
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
    """The extra cost of one forward with packed weights: the largest extra bytes of a layer, and the extra traffic and
    launches of all layers together."""

    extra_bytes: int
    traffic_bytes: int
    launches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpackingFootprint:
    """The footprint of a pipeline with plain weights, plus the cost of unpacking, by component."""

    plain: Footprint
    parts: Mapping[str, UnpackingCost]

    @property
    def workspace_bytes(self) -> int:
        """The workspace of the plain pipeline."""
        return self.plain.workspace_bytes

    def makes(self, use: Use) -> bool:
        """The uses of the plain pipeline."""
        return self.plain.makes(use)

    @property
    def evaluations(self) -> int:
        """The evaluations of the plain pipeline."""
        return self.plain.evaluations

    def activation(self, use: Use, decode: Sequence[Decode]) -> Estimate:
        """The activation bytes of the plain pipeline, plus the unpacking of the largest layer."""
        found, part = self.plain.activation(use, decode), self.parts.get(use.component)
        if part is None:
            return found
        more = part.extra_bytes
        return replace(found, size_bytes=found.size_bytes + more, reserved_bytes=found.reserved_bytes + more)

    def work(self, use: Use, decode: Sequence[Decode]) -> Work:
        """The work of the plain pipeline, plus unpacking each layer once per forward."""
        found, part = self.plain.work(use, decode), self.parts.get(use.component)
        if part is None:
            return found
        traffic = found.traffic_bytes + part.traffic_bytes * found.forwards
        return replace(found, traffic_bytes=traffic, launches=found.launches + part.launches * found.forwards)


def unpacking_cost(name: str, module: torch.nn.Module, dtype: torch.dtype, plain: Simulation) -> UnpackingCost:
    """The extra cost of one forward of this module over one with plain weights of `dtype`. Each layer has as many rows
    as in the simulation `plain`, one if it did not run there."""
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
    """The cost of casting a layer to `size` bytes per weight before it runs, and back afterwards."""
    tensors = list(layer.parameters())
    count = sum(tensor.numel() for tensor in tensors)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return UnpackingCost(
        extra_bytes=max(0, count * size - stored),
        traffic_bytes=2 * (stored + count * size),
        launches=2 * len(tensors),
    )


def _packed_cost(layer: PackedLinear, rows: int, dtype: torch.dtype) -> UnpackingCost:
    """The extra cost of a packed layer over a plain one, on this number of rows."""
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
    """Run a layer; return the most bytes that it allocates, and its work."""
    allocator = ledger.allocator
    ledger.costs.clear()
    start = allocator.peak_allocated_bytes = allocator.allocated_bytes
    layer(given)
    return allocator.peak_allocated_bytes - start, ledger.cost
