"""What a strategy is: one way to set one axis, its price in memory, and the diffusers call that makes it so.

A setting is an instance of its strategy's class: the options are its fields. Adding a strategy means
writing one such class in one file and naming it in the registry.
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
# The name of a file as an option of a setting: the last one, which is the rest of the setting's text as it stands.
FileName = NewType("FileName", str)
NO_FILE = FileName("")
# Text encoders below weigh little beside any denoiser that has one: CLIP's are 0.2 and 1.3 GiB, T5-XXL 8.9 GiB.
_LARGE_ENCODER = 1 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Where a component's weights are under a placement, and what has to be moved. All in bytes.

    `running_bytes` are on the device while the component runs, `idle_bytes` while another one does. One
    that `lingers` stays whole until the next in the offload sequence runs. `host_bytes` is pageable RAM,
    `pinned_bytes` page-locked RAM, `host_transient_bytes` what is needed beside them while applying.
    `moved_in_bytes` and `moved_out_bytes` cross the link on each forward, behind its compute where they are
    `overlapped`, with the share `unhidden` of the shorter of both paid all the same; `waited_bytes` cross it with
    nothing behind, half of them back to pageable memory; `disk_bytes` are kept in files and read from
    there on each forward; `pauses` counts the transfers a forward waits
    for, `leaf_hooks` the hooks it passes beside; `rate` is the share of the link's pinned rate those transfers reach,
    `pageable` that they are from pageable memory and back. `read_bytes` are read from the model's
    files anew for each call: all else here then holds only while the component encodes the prompt, with none loaded
    yet of those that read nothing.
    """

    running_bytes: int
    idle_bytes: int = 0
    lingers: bool = False
    host_bytes: int = 0
    pinned_bytes: int = 0
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

    @property
    def freed(self) -> bool:
        """Whether the component is nowhere any more once the prompt is encoded."""
        return self.read_bytes > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What a VAE has before it at one time: pixels, frames and batch, and the whole it belongs to."""

    height: int
    width: int
    frames: int
    batch: int
    whole_pixels: int

    @property
    def pixels(self) -> int:
        """Pixels of all frames and pictures worked on together."""
        return self.height * self.width * self.frames * self.batch


@runtime_checkable
class Placement(Protocol):
    """How much of a component is on the device, and when.

    Under one that is `freed` a component is gone, for good, once the prompt is encoded and before others are loaded;
    it is for all components of a role, or for none of them.
    """

    name: ClassVar[str]
    axis: ClassVar[Axis]
    quality: ClassVar[Quality]
    whole_pipeline: ClassVar[bool]
    freed: ClassVar[bool]

    @property
    def direct(self) -> bool:
        """Whether weights can be loaded straight to the device."""

    @property
    def ladder(self) -> str:
        """The ladder that this is a rung of: each takes more memory and less time. Empty for a setting by itself."""

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """The settings worth trying on this component, the rungs of a ladder from the lowest to the highest."""

    def complete(self, component: Component) -> Self:
        """The setting with what the component alone can tell filled in."""

    def refusal(self, component: Component, spec: PipelineSpec, accelerator: Accelerator | None) -> str | None:
        """Why this setting cannot be, as a sentence; None when it can."""

    def unpinned(self) -> Self:
        """The same without pinned copies of weights; itself where it has none."""

    def hold(self, component: Component, spec: PipelineSpec) -> Hold:
        """Where the component's weights are under this setting."""

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Make it so on a live pipeline, through diffusers' own call."""

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Take the hooks off again. Where the weights were before is for the caller to restore."""

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """The same as lines of Python on an object called `pipe`."""


@runtime_checkable
class Weights(Protocol):
    """How many bytes a component weighs."""

    name: ClassVar[str]
    axis: ClassVar[Axis]

    @property
    def quality(self) -> Quality:
        """What it does to the picture."""

    @property
    def quantized(self) -> str:
        """What `Component.quantized` is under this setting; empty where weights stay plain tensors."""

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """The settings worth trying on this component."""

    def refusal(self, component: Component) -> str | None:
        """Why this setting cannot be, as a sentence; None when it can."""

    def lighten(self, module: torch.nn.Module) -> None:
        """Give a module without data, hollow or on the meta device, the form it has under this setting, in place."""

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Make it so on a live pipeline, through diffusers' own call."""

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Take it off again, as far as that can be."""

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """The same as lines of Python on an object called `pipe`."""


class LoadRecord(Protocol):
    """What is known of a component that is to be loaded: what a plan's record of it says."""

    @property
    def name(self) -> str:
        """In the pipeline."""

    @property
    def class_name(self) -> str:
        """Of the module."""

    @property
    def library(self) -> str:
        """diffusers or transformers."""

    @property
    def dtype(self) -> str:
        """To load in and compute with."""


@runtime_checkable
class AtLoad(Weights, Protocol):
    """Weights that take their form while the pipeline is loaded; a live one cannot be given it."""

    @property
    def source(self) -> Path | None:
        """The file that is loaded in place of the component's own weights; None where those are."""

    def load(self, record: LoadRecord) -> dict[str, Any]:
        """More arguments for the component's `from_pretrained`, or for `from_single_file` where there is a `source`."""

    def load_code(self, record: LoadRecord) -> tuple[str, str]:
        """A line to come before, and the same arguments as text, each after a comma."""


@runtime_checkable
class Execution(Protocol):
    """How a component's operations are carried out: the same work, by other kernels."""

    name: ClassVar[str]
    axis: ClassVar[Axis]
    simulated: ClassVar[bool]

    @property
    def quality(self) -> Quality:
        """What the other kernels do to the picture."""

    @property
    def unknown(self) -> str:
        """What the figures of a plan leave out of this setting, as a phrase; empty where they leave out nothing."""

    @classmethod
    def variants(cls, component: Component, accelerator: Accelerator) -> Iterable[Self]:
        """The settings worth trying unasked: only those whose figures are known."""

    def refusal(self, component: Component, accelerator: Accelerator | None) -> str | None:
        """Why this setting cannot be here, as a sentence; None when it can."""

    def conflict_with(self, placement: Placement) -> str | None:
        """Why this setting cannot be on a component under that placement; None when it can."""

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Make it so on a live pipeline, through diffusers' own call. `kernel_state` is what puts it back."""

    def code(self, names: Sequence[str], device: str) -> list[str]:
        """The same as lines of Python on an object called `pipe`."""


@runtime_checkable
class Decode(Protocol):
    """How much of a picture the VAE works on at a time."""

    name: ClassVar[str]
    axis: ClassVar[Axis]
    quality: ClassVar[Quality]

    @classmethod
    def variants(cls, vae: Component, workload: Workload) -> Iterable[Self]:
        """The settings worth trying on this VAE for this workload."""

    def refusal(self, vae: Component, workload: Workload) -> str | None:
        """Why this setting cannot be or would do nothing, as a sentence; None when it works."""

    def shrink(self, picture: Picture, vae: Component) -> Picture:
        """What is left before the VAE at one time."""

    def apply(self, pipe: Any, names: Sequence[str]) -> None:
        """Make it so on the live VAEs of these names."""

    def code(self, names: Sequence[str], modules: Mapping[str, Any]) -> list[str]:
        """The same as lines of Python on an object called `pipe`; `modules` are the VAEs, weightless or live."""


# A strategy whose settings leave attributes behind names them in a class variable `leaves`, for undoing: of modules the
# name, or what several names begin with; of the pipeline the name after this.
ON_PIPE = "pipe."

# Settings with the components each is for, in the order to apply them: see `settings.grouped`.
Placed = Sequence[tuple[Weights | Placement | Execution, Sequence[str]]]
Decodes = Sequence[tuple[Decode, Sequence[str]]]


def half_freed(
    placement: Mapping[str, Placement], components: Iterable[Component]
) -> tuple[tuple[str, str], str] | None:
    """Two components of a role of which only the first is freed, and by which setting; None where there are none."""
    by_role: dict[str, list[str]] = {}
    for component in components:
        by_role.setdefault(component.role, []).append(component.name)
    for names in by_role.values():
        told = {name: placement[name] for name in names if name in placement}
        freed = [name for name, setting in told.items() if setting.freed]
        others = [name for name in told if name not in freed]
        if freed and others:
            return (freed[0], others[0]), told[freed[0]].name
    return None


def freed_first(placed: Placed) -> tuple[list[Any], list[Any]]:
    """The settings of components that encode the prompt and are gone before the others are loaded; and all others.

    What is done to the weights of such a component goes with it.
    """
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
    """Put settings on a pipeline, each through its own diffusers calls; `done` is told of the components each is on.

    A `hollow` one has no data that could be rounded: its weights only take the form they would have.
    """
    for decode, names in decodes:
        decode.apply(pipe, names)
    for setting, names in placed:
        for several in [names] if isinstance(setting, Placement) and setting.whole_pipeline else _each(names):
            if hollow and isinstance(setting, Weights):
                setting.lighten(pipe.components[several[0]])
            else:
                setting.apply(pipe, several, device)
            done(several)


def _each(names: Sequence[str]) -> list[Sequence[str]]:
    return [[name] for name in names]


def worth_quantizing(component: Component) -> bool:
    """Whether rounding the component saves much: denoisers, and text encoders that weigh as much as one."""
    large = component.role == "text_encoder" and component.weight_bytes >= _LARGE_ENCODER
    return large or component.role in ("denoiser", "control")


def missing_package(name: str) -> str | None:
    """What to install, where a package that a setting needs is not."""
    if find_spec(name) is None:
        return f"{name} is not installed: pip install {name}, or vramplan[quantization]"
    return None


def unpinned(placed: Placed) -> Placed:
    """The same settings without pinned copies of weights."""
    return [(setting.unpinned() if isinstance(setting, Placement) else setting, names) for setting, names in placed]


# What diffusers' hooks leave on a module: their registry, and a forward in place of the class's.
DIFFUSERS_HOOK = ("_diffusers_hook", "forward")


def remove_group_hooks(pipe: Any, names: Sequence[str]) -> None:
    """Take diffusers' group offloading hooks off; it has no public call for it (0.42)."""
    from diffusers.hooks import HookRegistry

    hooks = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
    for name in names:
        registry = HookRegistry.check_if_exists_or_initialize(pipe.components[name])
        for hook in hooks:
            registry.remove_hook(hook, recurse=True)


class WithoutOptions:
    """A placement of which there is one variant where it does not list others, and that has nothing to fill in."""

    __slots__ = ()

    @property
    def ladder(self) -> str:
        """None."""
        return ""

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """One setting."""
        return (cls(),)

    def complete(self, component: Component) -> Self:
        """The setting as it is."""
        return self

    def unpinned(self) -> Self:
        """The setting as it is."""
        return self


def offload_refusal(component: Component, spec: PipelineSpec, accelerator: Accelerator | None) -> str | None:
    """Why no CPU offload at all can be put on this component; the same for every kind of it."""
    if spec.device_map is not None:
        return (
            "the pipeline has a device map over several devices, which excludes CPU offload: call "
            "pipe.reset_device_map() first"
        )
    if accelerator is not None and accelerator.unified:
        return f"{accelerator.name} shares one memory with the CPU: offloading frees nothing"
    return component.move_refusal
