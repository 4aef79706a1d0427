"""The facts: what well-known pipelines are made of, and what well-known devices can do.

Bundled ones, and the user's own (`profile_files`), which win over a bundled one of the same name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Gt

from vramplan.errors import UsageError, VramplanError
from vramplan.hardware.pcie import LANE_BYTES_PER_S
from vramplan.hardware.types import Accelerator, AcceleratorKind, Host, Rates
from vramplan.profiles.files import (
    ProfileKind,
    is_users,
    mentions,
    mistakes,
    profile_files,
    read_profile,
)

Dtype = Literal["float32", "float16", "bfloat16"]
PcieGeneration = Literal[1, 2, 3, 4, 5]
Count = Annotated[int, Gt(0)]
Amount = Annotated[float, Gt(0)]
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
    what has no weights; `published` is a figure that others give for them, with its source in brackets: a count
    (`2.8B`) or the size of them all in a dtype (`23.8 GB in bfloat16`), of two components alike together (`57.2 GB for
    both in bfloat16`); `dtype` is the one its authors load it in where the pipeline's is not;
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

    generation: PcieGeneration
    lanes: Count

    @property
    def bytes_per_s(self) -> float:
        """What the link carries one way at best, in bytes per second."""
        return LANE_BYTES_PER_S[self.generation] * self.lanes


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """What a device can do. Rates are peaks, in 10^9 bytes and 10^12 operations per second.

    `match` holds the names its driver reports, which models of several memory sizes may share; `memory_bytes`
    is what a program can get of an idle device; `half_tflops` is dense, with float32 accumulation; `native`
    names the torch dtypes it computes in; `compute_capability` is CUDA's.

    One of three says how it is reached from the host: `link` over PCI Express, `link_gb_per_s` over another
    link (one way), and `pool_bytes` where there is none, as both share a memory of that size.

    `unconfirmed` marks a profile with recalled or assumed figures, which its `source` names.
    """

    __pydantic_config__ = _STRICT

    name: str
    title: str
    kind: AcceleratorKind
    match: tuple[str, ...]
    memory_bytes: Count
    memory_gb_per_s: Amount
    half_tflops: Amount
    link: LinkProfile | None = None
    link_gb_per_s: Amount | None = None
    pool_bytes: Count | None = None
    native: tuple[str, ...]
    compute_capability: str | None = None
    source: str
    unconfirmed: bool = False

    def __post_init__(self) -> None:
        """Refuse what no device is like."""
        if [self.link, self.link_gb_per_s, self.pool_bytes].count(None) != 2:
            raise ValueError(
                "give one of link (PCI Express), link_gb_per_s (any other) and pool_bytes (the host's too)"
            )
        if self.pool_bytes is not None and self.memory_bytes > self.pool_bytes:
            raise ValueError("memory_bytes is more than pool_bytes, the memory it is a part of")
        if self.compute_capability is not None and not re.fullmatch(r"\d+\.\d", self.compute_capability):
            raise ValueError('compute_capability is not of the form "8.9", in quotes')

    @property
    def link_bytes_per_s(self) -> float | None:
        """What its link carries one way at best, in bytes per second; None where there is no link."""
        if self.link is not None:
            return self.link.bytes_per_s
        return None if self.link_gb_per_s is None else self.link_gb_per_s * 1e9


def pipeline_names() -> tuple[str, ...]:
    """The names of the pipeline profiles, sorted."""
    return tuple(sorted(profile_files("pipelines")))


def device_names() -> tuple[str, ...]:
    """The names of the device profiles, sorted."""
    return tuple(sorted(profile_files("devices")))


def profile_path(kind: ProfileKind, name: str) -> Path:
    """The file of a profile; case does not matter.

    Raises:
        UsageError: no profile has that name; the message suggests the nearest ones.
    """
    path = _find(kind, name)
    if path is None:
        raise _unknown(kind, name, sorted(profile_files(kind)))
    return path


def load_pipeline_profile(name_or_repo_id: str) -> PipelineProfile:
    """The facts about a pipeline, by profile name (`cogvideox-5b`) or hub id (`THUDM/CogVideoX-5b`).

    Raises:
        UsageError: neither a name nor a hub id that is known here; the message suggests the nearest ones.
        VramplanError: the file does not hold a profile; the message names the file and the place in it.
    """
    path = _find("pipelines", name_or_repo_id)
    if path is not None:
        return read_profile(path, PipelineProfile)
    matching = _matching("pipelines", PipelineProfile, name_or_repo_id, lambda profile: profile.repos)
    _, found = next(matching, (None, None))
    if found is None:
        repos = (repo for _, profile in _readable("pipelines", PipelineProfile) for repo in profile.repos)
        raise _unknown("pipelines", name_or_repo_id, (*pipeline_names(), *repos))
    return found


def load_device_profile(name: str) -> DeviceProfile:
    """The facts about a device, by profile name (`rtx-4090`).

    Raises:
        UsageError: no profile has that name; the message suggests the nearest ones.
        VramplanError: the file does not hold a profile; the message names the file and the place in it.
    """
    return read_profile(profile_path("devices", name), DeviceProfile)


def device_profiles() -> tuple[DeviceProfile, ...]:
    """Every device profile that can be read; a broken file of the user's is passed over."""
    return tuple(profile for _, profile in _readable("devices", DeviceProfile))


def own_profiles(kind: ProfileKind) -> dict[str, tuple[str, ...]]:
    """The names of the user's own profiles, each with the mistakes in its file."""
    return {name: mistakes(path, _TYPES[kind]) for name, path in profile_files(kind).items() if is_users(path)}


def device_accelerator(profile: DeviceProfile) -> Accelerator:
    """The device as if it were the first of this machine and idle, for planning for one you don't hold."""
    return Accelerator(
        kind=profile.kind,
        index=0,
        name=profile.match[0] if profile.match else profile.title,
        total_bytes=profile.memory_bytes,
        free_bytes=profile.memory_bytes,
        unified=profile.pool_bytes is not None,
        link_bytes_per_s=profile.link_bytes_per_s,
        rates=_rates(profile),
    )


def device_host(profile: DeviceProfile, host: Host) -> Host:
    """The host to plan with: this machine's, or, for a device that shares its host's memory, that one, idle."""
    if profile.pool_bytes is None:
        return host
    return Host(
        total_bytes=profile.pool_bytes, available_bytes=profile.pool_bytes, disk_free_bytes=host.disk_free_bytes
    )


def rates_for(
    accelerator_name: str, total_bytes: int | None = None, link_bytes_per_s: float | None = None
) -> Rates | None:
    """The rates of the device that a driver calls by this name (`NVIDIA GeForce RTX 4090`); None if unknown.

    Of models that share the name, the one whose memory is nearest to `total_bytes`. The link is the one that was read
    where it stands, if it was: a slot may give it fewer lanes than the card takes.
    """
    found = _by_driver_name(accelerator_name, total_bytes)
    if found is None:
        return None
    rates = _rates(found)
    if link_bytes_per_s in (None, found.link_bytes_per_s) or found.link_bytes_per_s is None:
        return rates
    return with_link(replace(rates, source=f"profile {found.name}"), link_bytes_per_s)


def with_link(rates: Rates, link_bytes_per_s: float) -> Rates:
    """The rates with a link that was read on the machine itself: bytes per second one way at best."""
    read = f"link assumed at {_LINK_EFFICIENCY:.0%} of the {link_bytes_per_s / 1e9:.3g} GB/s of its slot"
    return replace(rates, link_bytes_per_s=link_bytes_per_s * _LINK_EFFICIENCY, source=f"{rates.source}, {read}")


def compute_capability(accelerator_name: str) -> float | None:
    """The CUDA compute capability of the device a driver calls by this name, as 8.9; None if unknown."""
    found = _by_driver_name(accelerator_name)
    return None if found is None else _capability(found)


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


def _by_driver_name(name: str, total_bytes: int | None = None) -> DeviceProfile | None:
    """Case does not matter, and neither does a leading `NVIDIA`, which drivers before 470 leave out."""
    found = list(_matching("devices", DeviceProfile, _bare(name), lambda profile: map(_bare, profile.match)))
    own = [profile for path, profile in found if is_users(path)]
    models = own or [profile for _, profile in found]
    size = total_bytes or 0
    return min(models, key=lambda profile: abs(profile.memory_bytes - size), default=None)


def _capability(profile: DeviceProfile) -> float | None:
    return None if profile.compute_capability is None else float(profile.compute_capability)


def _rates(profile: DeviceProfile) -> Rates:
    memory = profile.memory_gb_per_s * 1e9
    link = profile.link_bytes_per_s
    return Rates(
        memory_bytes_per_s=memory,
        # A copy within one memory reads it and writes it.
        link_bytes_per_s=memory / 2 if link is None else link * _LINK_EFFICIENCY,
        half_flops_per_s=profile.half_tflops * 1e12,
        reached=_REACHED_HOPPER if 9 <= (_capability(profile) or 0) < 12 else _REACHED,
        source=f"profile {profile.name}, {_link_source(profile)}",
    )


def _link_source(profile: DeviceProfile) -> str:
    if profile.link_bytes_per_s is None:
        return "copies assumed at half its memory's rate, which the host shares"
    link = profile.link
    called = f"{profile.link_gb_per_s:g} GB/s" if link is None else f"PCIe {link.generation} x{link.lanes}"
    return f"link assumed at {_LINK_EFFICIENCY:.0%} of {called}"


def _bare(name: str) -> str:
    return name.strip().casefold().removeprefix("nvidia ")


def _find(kind: ProfileKind, name: str) -> Path | None:
    wanted = name.strip().casefold()
    return next((path for stem, path in profile_files(kind).items() if stem.casefold() == wanted), None)


def _readable(kind: ProfileKind, profile_type: type[Profile], holding: str = "") -> Iterator[tuple[Path, Profile]]:
    """The profiles whose file holds the text: parsing only those keeps a look-up in the milliseconds.

    A broken file of the user's is passed over: it is told of where it is asked for by name.
    """
    for path in profile_files(kind).values():
        if not mentions(path, holding):
            continue
        try:
            yield path, read_profile(path, profile_type)
        except VramplanError:
            if not is_users(path):
                raise


def _matching(
    kind: ProfileKind, profile_type: type[Profile], name: str, keys: Callable[[Profile], Iterable[str]]
) -> Iterator[tuple[Path, Profile]]:
    wanted = name.strip().casefold()
    for path, profile in _readable(kind, profile_type, wanted):
        if wanted in {key.casefold() for key in keys(profile)}:
            yield path, profile


def _unknown(kind: ProfileKind, name: str, known: Iterable[str]) -> UsageError:
    wanted = name.strip().casefold()
    spelled = {candidate.casefold(): candidate for candidate in known}
    # A part of a name first: by likeness alone, a100 is nearer to a10 than to a100-40gb.
    longer = (key for key in spelled if wanted and wanted in key)
    near = tuple(dict.fromkeys((*longer, *difflib.get_close_matches(wanted, spelled, cutoff=0.5))))[:3]
    listed = [spelled[key] for key in near or spelled]
    advice = f"did you mean {' or '.join(listed)}?" if near else f"there are {', '.join(listed)}"
    return UsageError(f"no {kind.removesuffix('s')} profile {name!r}: {advice}")


_TYPES: Mapping[ProfileKind, type[Any]] = {"pipelines": PipelineProfile, "devices": DeviceProfile}
