"""Trace components one by one, for a pipeline whose whole call cannot be simulated.

The inputs are built from the configurations and the workload, in the shapes that the classes of diffusers and
transformers take. A component that accepts none of them is left out.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import torch

from vramplan.pipeline.dtypes import torch_dtype
from vramplan.pipeline.latents import denoiser_shape, vae_scale
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.simulator.allocator import CachingAllocator
from vramplan.simulator.kernels import Kernels
from vramplan.simulator.parts import Parts
from vramplan.simulator.run import ComponentsOnly, allocate_cublas_workspace, decode_all, simulate_call
from vramplan.simulator.types import DecodedLatents, SimulatedUse, Simulation, SimulationError
from vramplan.workload import Workload

# Text tokens of an encoder's forward, and of a denoiser's text input: the default of FLUX.1, SD3 and Wan.
_TOKENS = 512
# The configuration keys of denoisers that hold the width of their text input.
_TEXT_WIDTHS = (
    "joint_attention_dim", "cross_attention_dim", "encoder_hid_dim", "caption_channels", "text_embed_dim", "text_dim",
    "caption_feat_dim", "cap_feat_dim",
)  # fmt: skip
_COSTS = ("flops", "traffic_bytes", "launches", "forwards")

Inputs = Mapping[str, Any]


def trace_components(parts: Parts, spec: PipelineSpec, workload: Workload, kernels: Kernels) -> Simulation:
    """One simulation, composed of one forward of each component that can be traced alone.

    `uses` holds only those components; the peaks of the whole call are unknown and 0.
    """
    needs: list[SimulatedUse] = []
    decoded: list[DecodedLatents] = []
    operations, seconds = 0, 0.0
    for name in dict.fromkeys(use.component for use in spec.uses):
        found = _trace_component(parts, spec.component(name), spec, workload, kernels)
        if found is None:
            continue
        operations, seconds = operations + found.operations, seconds + found.wall_seconds
        decoded += found.decoded
        own = [use for use in found.uses if use.component == name]
        for phase in dict.fromkeys(use.phase for use in spec.uses if use.component == name):
            times = sum((use.phase, use.component) == (phase, name) for use in spec.uses)
            need = max(use.need_bytes for use in own)
            cost = {key: sum(getattr(use, key) for use in own) * times for key in _COSTS}
            kinds = Counter[str]()
            for use in own:
                kinds.update({kind: flops * times for kind, flops in use.flops_by_kind.items()})
            needs.append(SimulatedUse(phase=phase, component=name, need_bytes=need, flops_by_kind=dict(kinds), **cost))
    return Simulation(
        peak_allocated_bytes=0,
        peak_reserved_bytes=0,
        host_peak_bytes=0,
        pinned_peak_bytes=0,
        phases=(),
        uses=tuple(needs),
        steps=1,
        decoded=tuple(decoded),
        capacity_bytes=None,
        fits=None,
        stopped=None,
        short_bytes=0,
        over_bytes=0,
        to_device_bytes=0,
        to_host_bytes=0,
        operations=operations,
        wall_seconds=seconds,
        notes=(),
    )


def _trace_component(
    parts: Parts, component: Component, spec: PipelineSpec, workload: Workload, kernels: Kernels
) -> Simulation | None:
    """The simulation with the first inputs that the component accepts, None if it accepts none."""
    only = Parts(cls=ComponentsOnly, modules={component.name: parts.modules[component.name]})
    for call in _candidate_calls(component, spec, workload):
        try:
            return simulate_call(only, lambda pipe: pipe.to("cuda:0"), call, CachingAllocator(), kernels)
        except SimulationError:
            continue
    return None


def _candidate_calls(component: Component, spec: PipelineSpec, workload: Workload) -> Iterator[Callable[[Any], None]]:
    if component.role in ("denoiser", "control"):
        inputs = _denoiser_inputs(component, spec, workload)
    elif component.role == "vae":
        inputs = _vae_inputs(component, spec, workload)
    else:
        inputs = _encoder_inputs(component)
    for made in inputs:
        yield _forward(component, made)


def _forward(component: Component, inputs: Inputs) -> Callable[[Any], None]:
    def call(pipe: Any) -> None:
        allocate_cublas_workspace()
        module = pipe.components[component.name]
        if component.role == "vae":
            if component.config.get("force_upcast") and component.dtype == "float16":
                module.to(torch.float32)  # as StableDiffusionXLPipeline does before it decodes
            latents = _fill(inputs["z"], component).to(next(module.parameters()).dtype)
            decode_all(module, latents, inputs.get("frames"))
            return
        takes = inspect.signature(type(module).forward).parameters
        module(**{name: _fill(value, component) for name, value in inputs.items() if name in takes})

    return call


def _fill(value: Any, component: Component) -> Any:
    """Replace shapes with tensors of the component's dtype on the device; keep other values."""
    if isinstance(value, tuple):
        return torch.zeros(value, dtype=torch_dtype(component.dtype), device="cuda:0")
    if isinstance(value, dict):
        return {key: _fill(item, component) for key, item in value.items()}
    return value.to("cuda:0") if isinstance(value, torch.Tensor) else value


def _encoder_inputs(component: Component) -> Iterator[Inputs]:
    positions = component.config.get("max_position_embeddings") or _TOKENS
    ids = torch.ones((1, min(_TOKENS, int(positions))), dtype=torch.long)
    yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    side = component.config.get("image_size") or 224
    yield {"pixel_values": (1, 3, int(side), int(side))}


def _vae_inputs(component: Component, spec: PipelineSpec, workload: Workload) -> Iterator[Inputs]:
    spatial, temporal = vae_scale(component)
    config = component.config
    channels = config.get("latent_channels") or config.get("z_dim") or 4
    size = workload.latent_sides(spatial)
    frames = 1 + (workload.num_frames - 1) // temporal
    batch = workload.num_images_per_prompt
    flat: tuple[int, ...] = (batch * (frames if spec.video else 1), channels, *size)
    deep: tuple[int, ...] = (batch, channels, frames, *size)
    yield from ({"z": shape} for shape in ((deep, flat) if spec.video else (flat, deep)))
    yield {"z": flat, "frames": flat[0]}


def _denoiser_inputs(component: Component, spec: PipelineSpec, workload: Workload) -> Iterator[Inputs]:
    shape = denoiser_shape(component, spec, workload)
    config, batch = component.config, shape.batch
    channels = config.get("in_channels") or 4
    widths = [width for key in _TEXT_WIDTHS for width in _numbers(config.get(key))] or [shape.width]
    for latent, width in product(_layouts(spec, workload, batch, channels), dict.fromkeys(widths)):
        text = (batch, _TOKENS, width)
        tokens = latent[1] if len(latent) == 3 else shape.tokens
        times = 6 * (config.get("addition_time_embed_dim") or 0)
        pooled = (
            config.get("pooled_projection_dim") or (config.get("projection_class_embeddings_input_dim") or 0) - times
        )
        yield {
            "sample": latent,
            "hidden_states": latent,
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": text,
            "encoder_attention_mask": torch.ones((batch, _TOKENS)),
            "pooled_projections": (batch, max(1, pooled)),
            "guidance": torch.ones(batch),
            "img_ids": (tokens, 3),
            "txt_ids": (_TOKENS, 3),
            "added_cond_kwargs": {
                "text_embeds": (batch, max(1, pooled)), "time_ids": torch.ones((batch, 6)), "resolution": None,
                "aspect_ratio": None,
            },
            "return_dict": False,
        }  # fmt: skip


def _layouts(spec: PipelineSpec, workload: Workload, batch: int, channels: int) -> Iterator[tuple[int, ...]]:
    """The shapes of latents that denoisers take: pictures, frames before or after channels, or packed tokens."""
    vae = next(iter(spec.vaes), None)
    spatial, temporal = vae_scale(vae)
    size = workload.latent_sides(spatial)
    frames = 1 + (workload.num_frames - 1) // temporal
    if spec.video:
        yield (batch, channels, frames, *size)
        yield (batch, frames, channels, *size)
    yield (batch, channels, *size)
    yield (batch, size[0] * size[1] * frames // 4, channels)


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return [int(item) for item in values if isinstance(item, int) and not isinstance(item, bool)]
