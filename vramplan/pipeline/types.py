"""What a pipeline is made of, as values. The same types come out of every source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vramplan.pipeline.sources import Source

Role = Literal["denoiser", "control", "text_encoder", "image_encoder", "vae", "other"]
PhaseName = Literal["encode", "denoise", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How a component's weights are cut into pieces that offloading can move one at a time, in bytes.

    `block_lists` has one tuple for each `ModuleList` or `Sequential` that block-level group offloading
    finds, holding the bytes of each block in order; `rest_bytes` is what stands outside of them.
    `block_modules` names the submodules diffusers must be told to look into to find those lists.
    `largest_leaf_bytes` is the most there is while one leaf runs: the leaf with what its parents hold
    themselves; `leaf_count` counts the modules that hold tensors themselves.
    `pinned_bytes` is what page-locked copies of all tensors occupy: torch's host allocator rounds each
    one up to a power of two (pytorch CachingHostAllocator, torch 2.13). `units` are the pieces
    partial residency moves one at a time: blocks, or what blocks consist of where those are large; `pinned_units`
    their pinned copies.
    """

    block_lists: tuple[tuple[int, ...], ...]
    block_modules: tuple[str, ...]
    rest_bytes: int
    largest_leaf_bytes: int
    leaf_count: int
    pinned_bytes: int
    units: tuple[int, ...]
    pinned_units: tuple[int, ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        """The bytes of every block, list after list."""
        return tuple(size for sizes in self.block_lists for size in sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """The tile a VAE works on when tiling is on, in pixels, as its class sets it.

    `sides` are the shorter sides a tile may have: those whose overlaps come out whole, so that the tiles
    join to a picture of the right size. Where tiling is `required` the VAE decodes in tiles or not at all.
    """

    height: int
    width: int
    sides: tuple[int, ...]
    always_on: bool = False
    required: bool = False

    @property
    def side(self) -> int:
        """The shorter side: the number a plan calls `tile`."""
        return min(self.height, self.width)

    def acts(self, height: int, width: int, tile: int) -> bool:
        """Whether a picture of this size is cut up when the shorter side of the tile is `tile`.

        Tiling acts only on a picture that is higher or wider than its tile.
        """
        scale = tile / self.side
        return height > self.height * scale or width > self.width * scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One module of a pipeline: what it weighs, how it can be cut, and what may be done with it.

    `weight_bytes` counts parameters and buffers as they are once loaded, each tied tensor once.
    `device` and `hooks` are those of a live module; None and empty for one that is not loaded. `quantized` says
    by what its weights are, library first (`torchao int8`), empty where they are plain. One that is
    `converted_at_load` gets weights of its own in RAM, others stay in pages of their files until they are moved;
    `cast_from_bytes` is what it weighs before something is done to its weights, 0 where nothing is. `variant` is
    that of the files it is loaded from, None for those without one.
    """

    name: str
    library: str
    class_name: str
    role: Role
    weight_bytes: int
    parameter_count: int
    dtype: str
    dtype_bytes: Mapping[str, int]
    geometry: Geometry
    config: Mapping[str, Any] = field(default_factory=dict)
    element_bytes: int
    slicing: bool = False
    tiling: Tiling | None = None
    group_offload_refusal: str | None = None
    block_offload_refusal: str | None = None
    leaf_offload_refusal: str | None = None
    sequential_offload_refusal: str | None = None
    disk_offload_refusal: str | None = None
    move_refusal: str | None = None
    quantized: str = ""
    attention_slicing_refusal: str | None = None
    attention_backend_refusal: str | None = None
    compile_refusal: str | None = None
    device: str | None = None
    hooks: tuple[str, ...] = ()
    converted_at_load: bool = False
    cast_from_bytes: int = 0
    variant: str | None = None

    @property
    def quantization_refusal(self) -> str | None:
        """Why no library can quantize this component, as a sentence; None where one can."""
        if self.quantized:
            return f"the weights of {self.class_name} are quantized already ({self.quantized})"
        if "layerwise_casting" in self.hooks:
            return f"the weights of {self.class_name} are cast by layerwise casting already"
        return self.leaf_offload_refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One moment of a pipeline call: this component runs, in this phase.

    `in_loop` uses come once for every denoising step. `optional` ones may be left out by the call, as
    an image encoder is when no picture is given.
    """

    phase: PhaseName
    component: str
    in_loop: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSpec:
    """A pipeline, described: enough to plan for it without its weights.

    `sequence` is `model_cpu_offload_seq` split at its arrows, None where the class has none, less the
    names that are not components of this pipeline. `excluded` is `_exclude_from_cpu_offload`.
    `sound` says that it makes sound, which has no height and width: those of its workload stand for its length.
    `frees_hooks` says whether its call ends by sending every component back (`maybe_free_model_hooks`);
    `encode_refusal` why its prompt cannot be encoded apart from the rest, None where it can.
    """

    class_name: str
    source: Source
    components: tuple[Component, ...]
    sequence: tuple[str, ...] | None
    excluded: frozenset[str]
    uses: tuple[Use, ...]
    video: bool
    sound: bool = False
    frees_hooks: bool = True
    device_map: Mapping[str, str] | None = None
    encode_refusal: str | None = None
    family: str | None = None
    notes: tuple[str, ...] = ()

    def component(self, name: str) -> Component:
        """The component of that name. Raises KeyError when the pipeline has none."""
        for component in self.components:
            if component.name == name:
                return component
        raise KeyError(name)

    @property
    def vaes(self) -> tuple[Component, ...]:
        """The components that turn latents into pictures."""
        return tuple(component for component in self.components if component.role == "vae")

    @property
    def weight_bytes(self) -> int:
        """All components together."""
        return sum(component.weight_bytes for component in self.components)
