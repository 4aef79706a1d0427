"""Value types that describe a pipeline and its components, the same for every source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vramplan.pipeline.sources import Source

Role = Literal["denoiser", "control", "text_encoder", "image_encoder", "vae", "other"]
PhaseName = Literal["encode", "denoise", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The pieces of a component's weights that offloading can move one at a time, in bytes.

    `block_lists` has one tuple for each `ModuleList` or `Sequential` that block-level group offloading finds, with the
    bytes of each block in order; `rest_bytes` counts the tensors outside of them. `block_modules` names the submodules
    that diffusers must search to find those lists. `largest_leaf_bytes` is the most on the device while one leaf runs:
    the leaf and the own tensors of its parents; `leaf_count` counts the modules with tensors of their own.
    `pinned_bytes` is the size of page-locked copies of all tensors: torch's host allocator rounds each one up to a
    power of two (pytorch CachingHostAllocator, torch 2.13). `units` are the pieces that partial residency moves one at
    a time: blocks, or the parts of large blocks; `pinned_units` are their page-locked copies.
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
    """The tile of a VAE with tiling on, in pixels, as set by its class.

    `sides` are the possible lengths of the shorter side: those with whole overlaps, so that the tiles join to a picture
    of the right size. If tiling is `required`, the VAE cannot decode without.
    """

    height: int
    width: int
    sides: tuple[int, ...]
    always_on: bool = False
    required: bool = False

    @property
    def side(self) -> int:
        """The shorter side, named `tile` in a plan."""
        return min(self.height, self.width)

    def acts(self, height: int, width: int, tile: int) -> bool:
        """Whether a picture of this size is split if the shorter side of the tile is `tile`.

        Tiling splits only pictures higher or wider than the tile.
        """
        scale = tile / self.side
        return height > self.height * scale or width > self.width * scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One module of a pipeline: its size, its pieces, and the operations it allows.

    `weight_bytes` counts loaded parameters and buffers, each tied tensor once. `device` and `hooks` are those of a live
    module; None and empty for one that is not loaded. `quantized` names library and format of its weights
    (`torchao int8`), empty for plain ones. Weights `converted_at_load` are the process's own in RAM; others stay in
    pages of their files until they are moved. `cast_from_bytes` is the size before a conversion of the weights, 0
    without one. `variant` is that of the files it is loaded from, or None. Each `..._refusal` is the reason against an
    operation, None if it is allowed.
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
    streaming_refusal: str | None = None
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
        """Why no library can quantize this component, as a sentence; None if one can."""
        if self.quantized:
            return f"the weights of {self.class_name} are quantized already ({self.quantized})"
        if "layerwise_casting" in self.hooks:
            return f"the weights of {self.class_name} are cast by layerwise casting already"
        return self.leaf_offload_refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One run of a component in a phase of a pipeline call.

    `in_loop` uses happen once for every denoising step. A call may skip `optional` ones: an image encoder, for
    instance, if no picture is given.
    """

    phase: PhaseName
    component: str
    in_loop: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSpec:
    """The description of a pipeline, sufficient to plan for it without its weights.

    `sequence` is `model_cpu_offload_seq` split at its arrows, without names that are not components of this pipeline,
    or None. `excluded` is `_exclude_from_cpu_offload`. `sound` pipelines make sound, which has no height and width:
    those of the workload stand for its length. `frees_hooks` says whether a call offloads every component at its end
    (`maybe_free_model_hooks`); `encode_refusal` why its prompt cannot be encoded separately, None if it can.
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
        """The component with this name. Raises KeyError if there is none."""
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
        """The weight bytes of all components together."""
        return sum(component.weight_bytes for component in self.components)
