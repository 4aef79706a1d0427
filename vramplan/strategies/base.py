"""The protocols of strategies: one way to set one axis, its price in memory, and the diffusers call that applies it.

A setting is an instance of its strategy's class, with the options as fields. To add a strategy, write one such class in
one file and name it in the registry. A `stock` one is made by public calls of diffusers and accelerate on one whole
pipeline: its code needs no vramplan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NewType, Protocol, Self, runtime_checkable

from vramplan.hardware.rates import UNHIDDEN
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.units import GIB
from vramplan.workload import Workload

if TYPE_CHECKING:
    import torch

Quality = Literal["lossless", "near_lossless", "lossy"]
QUALITIES: tuple[Quality, ...] = ("lossless", "near_lossless", "lossy")
Axis = str  # the name of a row of `strategies.AXES`
# A file name as an option of a setting: the last one, which takes the rest of the text unchanged.
FileName = NewType("FileName", str)
NO_FILE = FileName("")
# Smaller text encoders weigh little next to a denoiser: CLIP's are 0.2 and 1.3 GiB, T5-XXL 8.9 GiB.
_LARGE_ENCODER = 1 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """The location of a component's weights under a placement, and the transfers it needs, in bytes.

    `running_bytes` are on the device while the component runs, `idle_bytes` while another one does. One that `lingers`
    stays whole until the next in the offload sequence runs. `host_bytes` is pageable RAM, `pinned_bytes` page-locked
    RAM, `host_transient_bytes` needed in addition while applying. `moved_in_bytes` and `moved_out_bytes` cross the link
    on each forward, hidden behind compute if `overlapped`, except for the share `unhidden` of the shorter of both;
    `waited_bytes` cross it without overlap, half of them back to pageable memory; `disk_bytes` are kept in files and
    read on each forward. `pauses` counts the transfers that a forward waits for, `leaf_hooks` the hooks it passes;
    `rate` is the share of the link's page-locked rate that transfers reach, `pageable` that they are from pageable
    memory and back. `shared_pinned_bytes` are page-locked buffers for copies that all components together have once.
    `read_bytes` are read from the model's files for each call: all other values then hold only while
    the prompt is encoded, before components without `read_bytes` are loaded.

    Streamed weights only: `loop_bytes` are on the device while another component of the denoising loop runs;
    `gathered_bytes` come to the device on each forward in addition, from pageable memory or, if `from_file`, from the
    model's own files; `entry_bytes` and `entry_gathered_bytes` do so once when the component's phase begins. `flat`
    ones are copied a block at a time, not tensor by tensor. `blocks` counts those on the device throughout, those that
    stay while the component's phase lasts, and all.
    """

    running_bytes: int
    idle_bytes: int = 0
    lingers: bool = False
    host_bytes: int = 0
    pinned_bytes: int = 0
    shared_pinned_bytes: int = 0
    host_transient_bytes: int = 0
    moved_in_bytes: int = 0
    moved_out_bytes: int = 0
    waited_bytes: int = 0
    disk_bytes: int = 0
    overlapped: bool = False
    pauses: int = 0
    leaf_hooks: int = 0
    rate: float = 1.0
    pageable: bool = False
    unhidden: float = UNHIDDEN["block"]
    read_bytes: int = 0
    loop_bytes: int | None = None
    gathered_bytes: int = 0
    entry_bytes: int = 0
    entry_gathered_bytes: int = 0
    from_file: bool = False
    flat: bool = False
    blocks: tuple[int, int, int] | None = None

    @property
    def freed(self) -> bool:
        """Whether the component is dropped once the prompt is encoded."""
        return self.read_bytes > 0

    def bytes_beside(self, *, in_loop: bool) -> int:
        """The bytes on the device while another component runs, one that is `in_loop` as this one or not."""
        return self.idle_bytes if self.loop_bytes is None or not in_loop else self.loop_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The part of a picture that a VAE works on at a time: pixels, frames and batch, and the pixels of the whole."""

    height: int
    width: int
    frames: int
    batch: int
    whole_pixels: int

    @property
    def pixels(self) -> int:
        """Pixels of all frames and pictures that are processed together."""
        return self.height * self.width * self.frames * self.batch


@runtime_checkable
class Placement(Protocol):
    """The part of a component on the device, and the time it is there.

    A `freed` placement drops the component once the prompt is encoded and before others are loaded; it is for all
    components of a role, or for none.
    """

    name: ClassVar[str]
    axis: ClassVar[Axis]
    stock: ClassVar[bool]
    quality: ClassVar[Quality]
    whole_pipeline: ClassVar[bool]
    freed: ClassVar[bool]

    @property
    def direct(self) -> bool:
        """Whether weights can be loaded straight to the device."""

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """Return the settings worth trying on this component."""

    def complete(self, component: Component) -> Self:
        """Return the setting with open options filled in from the component."""

    def refusal(self, component: Component, spec: PipelineSpec, accelerator: Accelerator | None) -> str | None:
        """Return a sentence on why this setting is impossible; None if it is possible."""

    def unpinned(self) -> Self:
        """Return the setting without page-locked copies of weights."""

    def hold(self, component: Component, spec: PipelineSpec) -> Hold:
        """Return the location of the component's weights under this setting."""

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Apply the setting to a live pipeline, with diffusers' own call."""

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Remove the hooks. The caller restores the location of the weights."""

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """Return the same as lines of Python on an object called `pipe`."""


@runtime_checkable
class Weights(Protocol):
    """The form of a component's weights."""

    name: ClassVar[str]
    axis: ClassVar[Axis]
    stock: ClassVar[bool]

    @property
    def quality(self) -> Quality:
        """The effect on the picture."""

    @property
    def quantized(self) -> str:
        """The value of `Component.quantized` under this setting; empty if weights stay plain tensors."""

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """Return the settings worth trying on this component."""

    def refusal(self, component: Component) -> str | None:
        """Return a sentence on why this setting is impossible; None if it is possible."""

    def lighten(self, module: torch.nn.Module) -> None:
        """Convert a module without data, hollow or on the meta device, to its form under this setting, in place."""

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Apply the setting to a live pipeline, with diffusers' own call."""

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Undo the setting, as far as possible."""

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """Return the same as lines of Python on an object called `pipe`."""


class LoadRecord(Protocol):
    """A component to load, as a plan records it."""

    @property
    def name(self) -> str:
        """The component's name in the pipeline."""

    @property
    def class_name(self) -> str:
        """The class of the module."""

    @property
    def library(self) -> str:
        """diffusers or transformers."""

    @property
    def dtype(self) -> str:
        """The dtype to load in and compute with."""


@runtime_checkable
class AtLoad(Weights, Protocol):
    """Weights that are converted while the pipeline is loaded; a live one cannot take the setting."""

    @property
    def source(self) -> Path | None:
        """The file that replaces the component's own weights; None without one."""

    @property
    def loads_on_device(self) -> bool:
        """Whether loading leaves the component on the device, wherever it is to be."""

    def load(self, record: LoadRecord) -> dict[str, Any]:
        """Return extra arguments for the component's `from_pretrained`, or `from_single_file` with a `source`."""

    def load_code(self, record: LoadRecord) -> tuple[str, str]:
        """Return an import line, and the same arguments as text, each after a comma."""


@runtime_checkable
class Execution(Protocol):
    """The kernels for a component's operations: the same work in another way."""

    name: ClassVar[str]
    axis: ClassVar[Axis]
    stock: ClassVar[bool]
    simulated: ClassVar[bool]

    @property
    def quality(self) -> Quality:
        """The effect of the other kernels on the picture."""

    @property
    def unknown(self) -> str:
        """The effects of the setting that a plan's figures leave out, as a phrase; empty without any."""

    @classmethod
    def variants(cls, component: Component, accelerator: Accelerator) -> Iterable[Self]:
        """Return the settings worth trying by default: only those with known figures."""

    def refusal(self, component: Component, accelerator: Accelerator | None) -> str | None:
        """Return a sentence on why this setting is impossible here; None if it is possible."""

    def conflict_with(self, placement: Placement) -> str | None:
        """Return a sentence on why the setting excludes that placement; None if it does not."""

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Apply the setting to a live pipeline, with diffusers' own call. `kernel_state` undoes it."""

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """Return the same as lines of Python on an object called `pipe`."""


@runtime_checkable
class Decode(Protocol):
    """The part of a picture that the VAE works on at a time."""

    name: ClassVar[str]
    axis: ClassVar[Axis]
    stock: ClassVar[bool]
    quality: ClassVar[Quality]

    @classmethod
    def variants(cls, vae: Component, workload: Workload) -> Iterable[Self]:
        """Return the settings worth trying on this VAE for this workload."""

    def refusal(self, vae: Component, workload: Workload) -> str | None:
        """Return a sentence on why this setting is impossible or has no effect; None if it works."""

    def shrink(self, picture: Picture, vae: Component) -> Picture:
        """Return the part of the picture that the VAE works on at a time."""

    def apply(self, pipe: Any, names: Sequence[str]) -> None:
        """Apply the setting to the live VAEs with these names."""

    def code(self, names: Sequence[str], modules: Mapping[str, Any]) -> list[str]:
        """Return the same as lines of Python on an object `pipe`; `modules` are the VAEs, weightless or live."""


# The attributes that a setting leaves behind are listed in the class variable `leaves`, to be undone: names of module
# attributes or their prefix, and names of pipeline attributes after this prefix.
ON_PIPE = "pipe."

# Settings with the names of their components, in the order to apply them: see `settings.grouped`.
Placed = Sequence[tuple[Weights | Placement | Execution, Sequence[str]]]
Decodes = Sequence[tuple[Decode, Sequence[str]]]


def half_freed(
    placement: Mapping[str, Placement], components: Iterable[Component]
) -> tuple[tuple[str, str], str] | None:
    """Return two components of one role of which only the first is freed, and its setting's name; None without any."""
    by_role: dict[str, list[str]] = {}
    for component in components:
        by_role.setdefault(component.role, []).append(component.name)
    for names in by_role.values():
        placed = [name for name in names if name in placement]
        freed = [name for name in placed if placement[name].freed]
        others = [name for name in placed if name not in freed]
        if freed and others:
            return (freed[0], others[0]), placement[freed[0]].name
    return None


def freed_first(placed: Placed) -> tuple[list[Any], list[Any]]:
    """Split settings into those of components that are freed before the others are loaded, and all others."""
    freed = {name for setting, names in placed if isinstance(setting, Placement) and setting.freed for name in names}
    first = [(setting, [name for name in names if name in freed]) for setting, names in placed]
    rest = [(setting, [name for name in names if name not in freed]) for setting, names in placed]
    return [item for item in first if item[1]], [item for item in rest if item[1]]


def apply_settings(
    pipe: Any,
    placed: Placed,
    decodes: Decodes,
    device: str,
    *,
    hollow: bool = False,
    done: Callable[[Sequence[str]], object] = lambda names: None,
) -> None:
    """Apply settings to a pipeline with diffusers' own calls; `done` is called with the components of each.

    A `hollow` pipeline has no data to round: its weights only take the form under the setting.
    """
    for decode, names in decodes:
        decode.apply(pipe, names)
    for setting, names in placed:
        whole = isinstance(setting, Placement) and setting.whole_pipeline
        for several in [names] if whole else [[name] for name in names]:
            if hollow and isinstance(setting, Weights):
                setting.lighten(pipe.components[several[0]])
            else:
                setting.apply(pipe, several, device)
            done(several)


def worth_quantizing(component: Component) -> bool:
    """Whether quantizing the component saves much: a denoiser, or a large text encoder."""
    large = component.role == "text_encoder" and component.weight_bytes >= _LARGE_ENCODER
    return large or component.role in ("denoiser", "control")


def missing_package(name: str) -> str | None:
    """Return a sentence on how to install a missing package; None if it is installed."""
    if find_spec(name) is None:
        return f"{name} is not installed: pip install {name}, or vramplan[quantization]"
    return None


def unpinned(placed: Placed) -> Placed:
    """Return the settings without page-locked copies of weights."""
    return [(setting.unpinned() if isinstance(setting, Placement) else setting, names) for setting, names in placed]


# Attributes that diffusers' hooks leave on a module: their registry, and a replaced forward.
DIFFUSERS_HOOK = ("_diffusers_hook", "forward")


class WithoutOptions:
    """Base of a placement without open options, by default with one variant."""

    __slots__ = ()

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """Return one setting."""
        return (cls(),)

    def complete(self, component: Component) -> Self:
        """Return the setting unchanged."""
        return self

    def unpinned(self) -> Self:
        """Return the setting unchanged."""
        return self


def offload_refusal(component: Component, spec: PipelineSpec, accelerator: Accelerator | None) -> str | None:
    """Return a sentence on why no kind of CPU offload is possible for this component; None if one is."""
    if spec.device_map is not None:
        return (
            "the pipeline has a device map over several devices, which excludes CPU offload: call "
            "pipe.reset_device_map() first"
        )
    if accelerator is not None and accelerator.unified:
        return f"{accelerator.name} shares one memory with the CPU: offloading frees nothing"
    return component.move_refusal
