"""What a strategy is: one way to set one axis, its price in memory, and the diffusers call that makes it so.

A setting is an instance of its strategy's class: the options are its fields. Adding a strategy means
writing one such class in one file and naming it in the registry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from vramplan.hardware.types import Accelerator
from vramplan.pipeline.types import Component, PipelineSpec
from vramplan.workload import Workload

if TYPE_CHECKING:
    import torch

Quality = Literal["lossless", "near_lossless", "lossy"]
QUALITIES: tuple[Quality, ...] = ("lossless", "near_lossless", "lossy")
Axis = Literal["weights", "placement", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Where a component's weights are under a placement, and what has to be moved. All in bytes.

    `running_bytes` are on the device while the component runs, `idle_bytes` while another one does. One
    that `lingers` stays whole until the next in the offload sequence runs. `host_bytes` is pageable RAM,
    `pinned_bytes` page-locked RAM, `host_transient_bytes` what is needed beside them while applying.
    `moved_in_bytes` and `moved_out_bytes` cross the link on each forward, behind its compute where they are
    `overlapped`; `waited_bytes` cross it with nothing behind; `disk_bytes` are kept in files and read from
    there on each forward; `pauses` counts the transfers a forward waits
    for; `rate` is the share of the link's pinned rate those transfers reach.
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
    rate: float = 1.0


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
    """How much of a component is on the device, and when."""

    name: ClassVar[str]
    axis: ClassVar[Axis]
    quality: ClassVar[Quality]
    whole_pipeline: ClassVar[bool]

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
    quality: ClassVar[Quality]

    @classmethod
    def variants(cls, component: Component) -> Iterable[Self]:
        """The settings worth trying on this component."""

    def refusal(self, component: Component) -> str | None:
        """Why this setting cannot be, as a sentence; None when it can."""

    def lightened(self, module: torch.nn.Module) -> torch.nn.Module:
        """A copy of the module under this setting, without its weights."""

    def apply(self, pipe: Any, names: Sequence[str], device: str) -> None:
        """Make it so on a live pipeline, through diffusers' own call."""

    def remove(self, pipe: Any, names: Sequence[str]) -> None:
        """Take it off again, as far as that can be."""

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


# Settings with the components each is for, in the order to apply them: weights first, then placements.
Placed = Sequence[tuple[Weights | Placement, Sequence[str]]]
Decodes = Sequence[tuple[Decode, Sequence[str]]]


def put_on(pipe: Any, placed: Placed, decodes: Decodes, device: str) -> None:
    """Put settings on a pipeline, live or simulated, each through its own diffusers calls."""
    for decode, names in decodes:
        decode.apply(pipe, names)
    for setting, names in placed:
        setting.apply(pipe, names, device)


def unpinned(placed: Placed) -> Placed:
    """The same settings without pinned copies of weights."""
    return [(setting.unpinned() if isinstance(setting, Placement) else setting, names) for setting, names in placed]


def remove_group_hooks(pipe: Any, names: Sequence[str]) -> None:
    """Take diffusers' group offloading hooks off; it has no public call for it (0.42)."""
    from diffusers.hooks import HookRegistry

    hooks = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
    for name in names:
        registry = HookRegistry.check_if_exists_or_initialize(pipe.components[name])
        for hook in hooks:
            registry.remove_hook(hook, recurse=True)


class WithoutOptions:
    """What a placement without options has in common with others: one variant, and nothing to fill in."""

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
