"""The bundled facts: what well-known pipelines are made of, and what well-known devices can do."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from vramplan.errors import UsageError, VramplanError
from vramplan.hardware.pcie import LANE_BYTES_PER_S
from vramplan.hardware.types import Accelerator, AcceleratorKind, Rates

ProfileKind = Literal["pipelines", "devices"]
Dtype = Literal["float32", "float16", "bfloat16"]
PcieGeneration = Literal[1, 2, 3, 4, 5]
Profile = TypeVar("Profile", "PipelineProfile", "DeviceProfile")

# The fraction of a link's rate which copies from pinned host memory reach after protocol overhead. Assumed:
# the usual measured fraction, as a profile stands for a link that nobody has measured.
_LINK_EFFICIENCY = 0.8

# The share of the peak that products and attention reach, once the time of all other kernels is taken off.
# Ampere 0.66: CogVideoX-5b in 180 s on an A100 (its model card). Hopper and later 0.38, as scaled dot product
# attention does not use all of their units: FLUX.1-dev in 6.6 s for 28 steps (diffusers pull request 11682) and
# CogVideoX-5b in 112 s (diffusers-torchao) on an H100 give 0.40 and 0.34. Others are taken to be like Ampere.
_REACHED, _REACHED_HOPPER = 0.66, 0.38

_STRICT: dict[str, Any] = {"extra": "forbid"}


def _yaml_key(field_name: str) -> str:
    """The key a field has in the file: `class` cannot be the name of a Python attribute."""
    return "class" if field_name == "class_name" else field_name


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadProfile:
    """What a pipeline generates by default: pixels, frames (None for pictures), steps, guidance, batch.

    `guidance_scale` is None where the pipeline's call takes none, or has none by default.
    """

    __pydantic_config__ = _STRICT

    height: int
    width: int
    num_frames: int | None = None
    num_inference_steps: int
    guidance_scale: float | None = None
    batch: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentProfile:
    """One component: its class, its configuration, and how many parameters that makes.

    `config` is what `build_weightless` takes; `parameters` counts each tied tensor once and is None for
    what has no weights; `dtype` is the one its authors load it in where the pipeline's is not;
    `model_max_length` is a tokenizer's, in tokens; `unconfirmed` marks what was recalled and not seen in
    a source.
    """

    __pydantic_config__ = _STRICT | {"alias_generator": _yaml_key}

    library: str
    class_name: str
    source: str
    config: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    published: str | None = None
    dtype: Dtype | None = None
    model_max_length: int | None = None
    unconfirmed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineProfile:
    """What a pipeline is made of, and what it does by default.

    `repos` are the hub ids it is published under; `dtype` is the one its authors load it in; `settings`
    are what the pipeline's class takes beside components (`boundary_ratio`).
    """

    __pydantic_config__ = _STRICT

    name: str
    title: str
    repos: tuple[str, ...]
    pipeline: str
    dtype: Dtype
    dtype_source: str
    workload: WorkloadProfile
    components: dict[str, ComponentProfile]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile:
    """The PCI Express link between a device and its host."""

    __pydantic_config__ = _STRICT

    generation: PcieGeneration
    lanes: int

    @property
    def bytes_per_s(self) -> float:
        """What the link carries one way at best, in bytes per second."""
        return LANE_BYTES_PER_S[self.generation] * self.lanes


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """What a device can do. Rates are peaks, in 10^9 bytes and 10^12 operations per second.

    `match` holds the names its driver reports; `memory_bytes` is what a program can get of an idle device;
    `half_tflops` is dense, with float32 accumulation; `native` names the torch dtypes it computes in;
    `unconfirmed` marks a profile with recalled figures, which its `source` names.
    """

    __pydantic_config__ = _STRICT

    name: str
    title: str
    kind: AcceleratorKind
    match: tuple[str, ...]
    memory_bytes: int
    memory_gb_per_s: float
    half_tflops: float
    link: LinkProfile
    native: tuple[str, ...]
    compute_capability: str
    source: str
    unconfirmed: bool = False


def pipeline_names() -> tuple[str, ...]:
    """The names of the bundled pipeline profiles, sorted."""
    return _names("pipelines")


def device_names() -> tuple[str, ...]:
    """The names of the bundled device profiles, sorted."""
    return _names("devices")


def profile_path(kind: ProfileKind, name: str) -> Path:
    """The file of a bundled profile; case does not matter.

    Raises:
        UsageError: no profile has that name; the message suggests the nearest ones.
    """
    path = _find(kind, name)
    if path is None:
        raise _unknown(kind, name, _names(kind))
    return path


def load_pipeline_profile(name_or_repo_id: str) -> PipelineProfile:
    """The facts about a pipeline, by profile name (`cogvideox-5b`) or hub id (`THUDM/CogVideoX-5b`).

    Raises:
        UsageError: neither a name nor a hub id that is known here; the message suggests the nearest ones.
        VramplanError: the file does not hold a profile; the message names the file and the place in it.
    """
    path = _find("pipelines", name_or_repo_id)
    if path is not None:
        return _load(path, PipelineProfile)
    found = _matching("pipelines", PipelineProfile, name_or_repo_id, lambda profile: profile.repos)
    if found is None:
        repos = (repo for path in _files("pipelines") for repo in _load(path, PipelineProfile).repos)
        raise _unknown("pipelines", name_or_repo_id, (*pipeline_names(), *repos))
    return found


def load_device_profile(name: str) -> DeviceProfile:
    """The facts about a device, by profile name (`rtx-4090`).

    Raises:
        UsageError: no profile has that name; the message suggests the nearest ones.
        VramplanError: the file does not hold a profile; the message names the file and the place in it.
    """
    return _load(profile_path("devices", name), DeviceProfile)


def device_accelerator(profile: DeviceProfile) -> Accelerator:
    """The device as if it were the first of this machine and idle, for planning for one you don't hold."""
    return Accelerator(
        kind=profile.kind,
        index=0,
        name=profile.match[0] if profile.match else profile.title,
        total_bytes=profile.memory_bytes,
        free_bytes=profile.memory_bytes,
        link_bytes_per_s=profile.link.bytes_per_s,
        rates=_rates(profile),
    )


def rates_for(accelerator_name: str) -> Rates | None:
    """The rates of the device that a driver calls by this name (`NVIDIA GeForce RTX 4090`); None if unknown."""
    found = _by_driver_name(accelerator_name)
    return None if found is None else _rates(found)


def compute_capability(accelerator_name: str) -> float | None:
    """The CUDA compute capability of the device a driver calls by this name, as 8.9; None if unknown."""
    found = _by_driver_name(accelerator_name)
    return None if found is None else float(found.compute_capability)


def math_dtypes(accelerator: Accelerator) -> tuple[str, ...]:
    """The dtypes for which torch has no fused attention on this card and computes it step by step.

    bfloat16 before compute capability 8.0: flash attention needs that, and the memory-efficient kernel takes float16
    and float32 there (torch 2.13, sdp_utils.cpp `less_than_sm80_mem_efficient_dtypes`).
    """
    capability = compute_capability(accelerator.name)
    return ("bfloat16",) if capability is not None and capability < 8.0 else ()


def holds_scores(accelerator: Accelerator, dtype: str) -> bool:
    """Whether torch's attention holds the scores of all tokens against all on this device."""
    return not accelerator.fuses_attention or dtype in math_dtypes(accelerator)


def _by_driver_name(name: str) -> DeviceProfile | None:
    """Case does not matter, and neither does a leading `NVIDIA`, which drivers before 470 leave out."""
    return _matching("devices", DeviceProfile, _bare(name), lambda profile: map(_bare, profile.match))


def _rates(profile: DeviceProfile) -> Rates:
    link = f"PCIe {profile.link.generation} x{profile.link.lanes}"
    return Rates(
        memory_bytes_per_s=profile.memory_gb_per_s * 1e9,
        link_bytes_per_s=profile.link.bytes_per_s * _LINK_EFFICIENCY,
        half_flops_per_s=profile.half_tflops * 1e12,
        reached=_REACHED_HOPPER if 9 <= float(profile.compute_capability) < 12 else _REACHED,
        source=f"profile {profile.name}, link assumed at {_LINK_EFFICIENCY:.0%} of {link}",
    )


def _bare(name: str) -> str:
    return name.strip().casefold().removeprefix("nvidia ")


def facts_directory() -> Path:
    """Where the bundled facts are."""
    package = Path(__file__).resolve().parent
    # The wheel carries the facts inside the package; a checkout has them beside it.
    for directory in (package / "_profiles", package.parent / "profiles"):
        if directory.is_dir():
            return directory
    raise VramplanError(f"the bundled profiles are missing from {package}: install vramplan again")


def _files(kind: ProfileKind) -> tuple[Path, ...]:
    return tuple(sorted((facts_directory() / kind).glob("*.yaml")))


def _names(kind: ProfileKind) -> tuple[str, ...]:
    return tuple(path.stem for path in _files(kind))


def _find(kind: ProfileKind, name: str) -> Path | None:
    wanted = name.strip().casefold()
    return next((path for path in _files(kind) if path.stem.casefold() == wanted), None)


def _mentioning(kind: ProfileKind, text: str) -> Iterator[Path]:
    """The files that hold the text anywhere: parsing only those keeps a look-up in the milliseconds."""
    return (path for path in _files(kind) if text in path.read_text(encoding="utf-8").casefold())


def _matching(
    kind: ProfileKind, profile_type: type[Profile], name: str, keys: Callable[[Profile], Iterable[str]]
) -> Profile | None:
    wanted = name.strip().casefold()
    for path in _mentioning(kind, wanted):
        profile = _load(path, profile_type)
        if wanted in {key.casefold() for key in keys(profile)}:
            return profile
    return None


def _unknown(kind: ProfileKind, name: str, known: Iterable[str]) -> UsageError:
    wanted = name.strip().casefold()
    spelled = {candidate.casefold(): candidate for candidate in known}
    # A part of a name first: by likeness alone, a100 is nearer to a10 than to a100-40gb.
    longer = (key for key in spelled if wanted and wanted in key)
    near = tuple(dict.fromkeys((*longer, *difflib.get_close_matches(wanted, spelled, cutoff=0.5))))[:3]
    listed = [spelled[key] for key in near or spelled]
    advice = f"did you mean {' or '.join(listed)}?" if near else f"there are {', '.join(listed)}"
    return UsageError(f"no bundled {kind.removesuffix('s')} profile {name!r}: {advice}")


def _load(path: Path, profile_type: type[Profile]) -> Profile:
    import yaml
    from pydantic import TypeAdapter, ValidationError

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        # Through JSON, strict validation takes a list for a tuple and a mapping for a dataclass: no more.
        return TypeAdapter(profile_type).validate_json(json.dumps(document), strict=True)
    except yaml.YAMLError as error:
        raise VramplanError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except TypeError as error:
        raise VramplanError(f"{path} holds more than plain values: {error}") from None
    except ValidationError as error:
        raise VramplanError(f"{path}: {_first_mistake(error.errors())}; correct the file") from None


def _first_mistake(errors: Iterable[Mapping[str, Any]]) -> str:
    mistake = next(iter(errors))
    place = ".".join(str(step) for step in mistake["loc"]) or "the whole document"
    return f"{place}: {mistake['msg']}"
