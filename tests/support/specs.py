"""Made-up pipelines and machines: components of any size, without a single weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vramplan.hardware.rates import Rates, Uncertainty
from vramplan.hardware.types import Accelerator, Budget
from vramplan.pipeline.call_order import uses_of
from vramplan.pipeline.classes import ClassFacts
from vramplan.pipeline.types import Component, Geometry, PipelineSpec, Tiling
from vramplan.workload import Workload

GIB = 1 << 30
MIB = 1 << 20
RATES = Rates(memory_bytes_per_s=500e9, link_bytes_per_s=20e9, half_flops_per_s=100e12, reached=0.6, source="made up")
UNSURE = replace(RATES, uncertainty=Uncertainty(computing=1.5, moving=3.0, reason="made up"))
WORK = Workload(height=1024, width=1024, num_inference_steps=20)
DIT = {"num_attention_heads": 16, "attention_head_dim": 64, "patch_size": 2, "in_channels": 16}
VAE = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16}


def geometry(size: int, *, blocks: int = 0, within: tuple[str, ...] = ()) -> Geometry:
    """`blocks` equal blocks in one list, a hundredth outside of them, leaves of a sixth of a block."""
    rest = size if not blocks else size // 100
    block = 0 if not blocks else (size - rest) // blocks
    return Geometry(
        block_lists=((block,) * blocks,) if blocks else (),
        block_modules=within if blocks else (),
        rest_bytes=size - block * blocks,
        largest_leaf_bytes=max(1, (block or size) // 6),
        leaf_count=max(1, 6 * blocks),
        pinned_bytes=size + size // 5,
        units=(block,) * blocks,
        pinned_units=(block + block // 5,) * blocks,
    )


def component(name: str, size: int = GIB, *, role: Any = "denoiser", blocks: int = 0, **changes: Any) -> Component:
    """A component of `size` bytes in bfloat16."""
    told: dict[str, Any] = {
        "library": "transformers" if "encoder" in role else "diffusers",
        "class_name": f"Some{role.title().replace('_', '')}",
        "parameter_count": size // 2,
        "dtype": "bfloat16",
        "dtype_bytes": {"bfloat16": size},
        "geometry": geometry(size, blocks=blocks),
        "element_bytes": 2,
        "config": DIT if role in ("denoiser", "control") else VAE if role == "vae" else {},
    }
    if role == "vae":
        told |= {
            "slicing": True,
            "tiling": Tiling(height=512, width=512, sides=tuple(range(512, 63, -64))),
            "block_offload_refusal": "its blocks would never be loaded",
        }
    return Component(name=name, role=role, weight_bytes=size, **(told | changes))


def pipeline(
    *components: Component,
    sequence: tuple[str, ...] | None = (),
    conditions: bool = False,
    excluded: frozenset[str] = frozenset(),
    **changes: Any,
) -> PipelineSpec:
    """A spec of these components, chained in their own order where no sequence is given."""
    names = tuple(item.name for item in components)
    chain = names if sequence == () else sequence
    facts = ClassFacts(
        name="SomePipeline",
        sequence=chain,
        expected=names,
        optional=frozenset(),
        excluded=excluded,
        unknown_in_sequence=(),
        video=bool(changes.get("video")),
        conditions=conditions,
        optional_uses=frozenset(),
        frees_hooks=True,
    )
    told: dict[str, Any] = {"class_name": "SomePipeline", "source": "made up", "video": False}
    return PipelineSpec(
        components=components,
        sequence=chain,
        excluded=excluded,
        uses=uses_of(components, facts),
        **(told | changes),
    )


def text_to_image(encoder: int = 4 * GIB, denoiser: int = 8 * GIB, vae: int = GIB // 4, **changes: Any) -> PipelineSpec:
    """The usual three."""
    return pipeline(
        component("text_encoder", encoder, role="text_encoder", blocks=8),
        component("transformer", denoiser, blocks=16),
        component("vae", vae, role="vae"),
        **changes,
    )


def card(size: int = 24 * GIB, **changes: Any) -> Accelerator:
    """A CUDA device."""
    told: dict[str, Any] = {"kind": "cuda", "index": 0, "name": "Some Card", "total_bytes": size, "free_bytes": size}
    return Accelerator(**(told | {"rates": RATES} | changes))


def budget(vram: int | None = 24 * GIB, ram: int = 256 * GIB) -> Budget:
    return Budget(vram_bytes=vram, ram_bytes=ram)
