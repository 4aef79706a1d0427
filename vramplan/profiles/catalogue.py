"""Profiles of well-known pipelines and devices: parts, default workloads, memory and rates.

A user's profile replaces the bundled one of the same name (`profile_files`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Gt

from vramplan.errors import VramplanError
from vramplan.hardware.pcie import LANE_BYTES_PER_S
from vramplan.hardware.rates import UNKNOWN_REACHED, Rates, architecture
from vramplan.hardware.types import Accelerator, AcceleratorKind, Host
from vramplan.profiles.files import ProfileKind, contains_text, is_user_file, mistakes, profile_files, read_profile
from vramplan.profiles.names import find_profile, profile_path, unknown_name

Dtype = Literal["float32", "float16", "bfloat16"]
PcieGeneration = Literal[1, 2, 3, 4, 5]
Count = Annotated[int, Gt(0)]
Amount = Annotated[float, Gt(0)]
AnyProfile = TypeVar("AnyProfile", "PipelineProfile", "DeviceProfile")

# The fraction of a link's rate that copies from page-locked host memory reach after protocol overhead. Assumed: the
# usual measured fraction, as a profile stands for a link that was not measured.
_LINK_EFFICIENCY = 0.8

_STRICT: dict[str, Any] = {"extra": "forbid"}


def _yaml_key(field_name: str) -> str:
    """The YAML key of a field: `class`, a Python keyword, is the field `class_name`."""
    return "class" if field_name == "class_name" else field_name


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadProfile:
    """A pipeline's default workload: pixels, frames (None for pictures), steps, guidance, batch.

    `guidance_scale` is None if the pipeline's call has no such argument, or no default for it.
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
    """One component: its class, its configuration, and the number of its parameters.

    `config` is the argument of `build_weightless`; `parameters` counts each tied tensor once and is None for a
    component without weights; `published` is their published number, with its source in brackets: a count (`2.8B`) or
    their size in a dtype (`23.8 GB in bfloat16`), of two equal components together (`57.2 GB for both in bfloat16`);
    `dtype` is the dtype its authors load it in, if not the pipeline's; `model_max_length` is a tokenizer's limit in
    tokens; `unconfirmed` marks facts recalled from memory, without a source.
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
    """A pipeline: its components and its default workload.

    `repos` are the hub ids it is published under; `dtype` is the dtype its authors load it in; `settings` are the
    arguments of the pipeline's class other than components (`boundary_ratio`).
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
        """The link's peak rate in one direction, in bytes per second."""
        return LANE_BYTES_PER_S[self.generation] * self.lanes


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """A device: its memory and its peak rates, in 10^9 bytes and 10^12 operations per second.

    `match` holds the names its driver reports, which models of several memory sizes may share; `memory_bytes` is the
    memory a program can use on an idle device; `half_tflops` is dense, with float32 accumulation; `native` names the
    torch dtypes it computes in; `compute_capability` is CUDA's; `reached` is the share of `half_tflops` that pipelines
    reach, where it is not that of its architecture.

    Exactly one field describes the link to the host: `link` (PCI Express), `link_gb_per_s` (another link, one
    direction), or `pool_bytes` (no link: device and host share a memory of that size).

    `unconfirmed` marks a profile with recalled or assumed numbers, which its `source` names.
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
    reached: Amount | None = None
    source: str
    unconfirmed: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for contradictory facts."""
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
        """The peak rate of the link in one direction, in bytes per second; None without a link."""
        if self.link is not None:
            return self.link.bytes_per_s
        return None if self.link_gb_per_s is None else self.link_gb_per_s * 1e9


def pipeline_names() -> tuple[str, ...]:
    """The names of the pipeline profiles, sorted."""
    return tuple(sorted(profile_files("pipelines")))


def device_names() -> tuple[str, ...]:
    """The names of the device profiles, sorted."""
    return tuple(sorted(profile_files("devices")))


def load_pipeline_profile(name_or_repo_id: str) -> PipelineProfile:
    """Load a pipeline profile by its name (`cogvideox-5b`) or hub id (`THUDM/CogVideoX-5b`).

    Raises:
        UsageError: no profile has that name or hub id; the message suggests the nearest ones.
        VramplanError: the file does not hold a profile; the message names the file and the place in it.
    """
    path = find_profile("pipelines", name_or_repo_id)
    if path is not None:
        return read_profile(path, PipelineProfile)
    matching = _matching("pipelines", PipelineProfile, name_or_repo_id, lambda profile: profile.repos)
    _, found = next(matching, (None, None))
    if found is None:
        repos = (repo for _, profile in _readable("pipelines", PipelineProfile) for repo in profile.repos)
        raise unknown_name("pipelines", name_or_repo_id, (*pipeline_names(), *repos))
    return found


def bundled_pipelines(class_name: str) -> tuple[PipelineProfile, ...]:
    """The bundled profiles of pipelines of this class, without those of the user."""
    found = _readable("pipelines", PipelineProfile, class_name.casefold())
    return tuple(profile for path, profile in found if profile.pipeline == class_name and not is_user_file(path))


def bundled_device(driver_name: str) -> str | None:
    """The name of the bundled profile of the device with this driver name; None if there is none."""
    found = _by_driver_name(driver_name)
    return None if found is None or is_user_file(profile_path("devices", found.name)) else found.name


def load_device_profile(name: str) -> DeviceProfile:
    """Load a device profile by its name (`rtx-4090`).

    Raises:
        UsageError: no profile has that name; the message suggests the nearest ones.
        VramplanError: the file does not hold a profile; the message names the file and the place in it.
    """
    return read_profile(profile_path("devices", name), DeviceProfile)


def device_profiles() -> tuple[DeviceProfile, ...]:
    """Every readable device profile; a user's file with mistakes is skipped."""
    return tuple(profile for _, profile in _readable("devices", DeviceProfile))


def user_profiles(kind: ProfileKind) -> dict[str, tuple[str, ...]]:
    """The names of the user's profiles, each with the mistakes in its file."""
    return {name: mistakes(path, _TYPES[kind]) for name, path in profile_files(kind).items() if is_user_file(path)}


def device_accelerator(profile: DeviceProfile) -> Accelerator:
    """The accelerator of a profile, idle and with index 0, to plan for a device this machine does not have."""
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
    """The host to plan with: the given one, or an idle host with the pool of a device of unified memory."""
    if profile.pool_bytes is None:
        return host
    return Host(
        total_bytes=profile.pool_bytes, available_bytes=profile.pool_bytes, disk_free_bytes=host.disk_free_bytes
    )


def rates_for(
    accelerator_name: str, total_bytes: int | None = None, link_bytes_per_s: float | None = None
) -> Rates | None:
    """The rates of the device with this driver name (`NVIDIA GeForce RTX 4090`); None if unknown.

    Of models that share the name, the one with memory nearest to `total_bytes` is used. `link_bytes_per_s`, if read on
    the machine, replaces the profile's link: a slot may have fewer lanes than the card.
    """
    found = _by_driver_name(accelerator_name, total_bytes)
    if found is None:
        return None
    rates = _rates(found)
    if link_bytes_per_s in (None, found.link_bytes_per_s) or found.link_bytes_per_s is None:
        return rates
    return with_link(replace(rates, source=f"profile {found.name}"), link_bytes_per_s)


def with_link(rates: Rates, link_bytes_per_s: float) -> Rates:
    """The rates with the link read on the machine: its peak in one direction, in bytes per second."""
    read = f"link assumed at {_LINK_EFFICIENCY:.0%} of the {link_bytes_per_s / 1e9:.3g} GB/s of its slot"
    return replace(rates, link_bytes_per_s=link_bytes_per_s * _LINK_EFFICIENCY, source=f"{rates.source}, {read}")


def compute_capability(accelerator_name: str) -> float | None:
    """The CUDA compute capability of the device with this driver name, such as 8.9; None if unknown."""
    found = _by_driver_name(accelerator_name)
    return None if found is None else _capability(found)


def math_dtypes(accelerator: Accelerator) -> tuple[str, ...]:
    """The dtypes for which torch has no fused attention on this card and uses its math kernel.

    bfloat16 before compute capability 8.0: flash attention needs that, and the memory-efficient kernel takes float16
    and float32 there (torch 2.13, sdp_utils.cpp `less_than_sm80_mem_efficient_dtypes`).
    """
    capability = compute_capability(accelerator.name)
    return ("bfloat16",) if capability is not None and capability < 8.0 else ()


def holds_scores(accelerator: Accelerator, dtype: str) -> bool:
    """Whether torch's attention holds the full score matrix, all tokens by all tokens, on this device."""
    return not accelerator.fuses_attention or dtype in math_dtypes(accelerator)


def _by_driver_name(name: str, total_bytes: int | None = None) -> DeviceProfile | None:
    """The profile with this driver name, ignoring case and a leading `NVIDIA`, which drivers before 470 omit."""
    found = list(_matching("devices", DeviceProfile, _model_name(name), lambda item: map(_model_name, item.match)))
    own = [profile for path, profile in found if is_user_file(path)]
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
        # A copy within one memory reads and writes it.
        link_bytes_per_s=memory / 2 if link is None else link * _LINK_EFFICIENCY,
        half_flops_per_s=profile.half_tflops * 1e12,
        source=f"profile {profile.name}, {_link_source(profile)}",
        **_shares(profile),
    )


def _shares(profile: DeviceProfile) -> dict[str, Any]:
    """The shares of its peak that a card reaches, by its architecture; without bfloat16 that is computed in float32."""
    found = architecture(_capability(profile))
    if found is None:
        return {"reached": profile.reached or UNKNOWN_REACHED, "basis": "fitted" if profile.reached else "assumed"}
    emulated = {} if "bfloat16" in profile.native else {"bfloat16_share": found.float32}
    reached = profile.reached or found.reached
    basis = "fitted" if profile.reached else found.basis
    return {"reached": reached, "float32_share": found.float32, "tf32_share": found.tf32, "basis": basis, **emulated}


def _link_source(profile: DeviceProfile) -> str:
    if profile.link_bytes_per_s is None:
        return "copies assumed at half its memory's rate, which the host shares"
    link = profile.link
    called = f"{profile.link_gb_per_s:g} GB/s" if link is None else f"PCIe {link.generation} x{link.lanes}"
    return f"link assumed at {_LINK_EFFICIENCY:.0%} of {called}"


def _model_name(name: str) -> str:
    return name.strip().casefold().removeprefix("nvidia ")


def _readable(
    kind: ProfileKind, profile_type: type[AnyProfile], holding: str = ""
) -> Iterator[tuple[Path, AnyProfile]]:
    """The profiles whose file contains the text: parsing only those keeps a look-up in the milliseconds.

    A user's file with mistakes is skipped; loading it by name reports them.
    """
    for path in profile_files(kind).values():
        if not contains_text(path, holding):
            continue
        try:
            yield path, read_profile(path, profile_type)
        except VramplanError:
            if not is_user_file(path):
                raise


def _matching(
    kind: ProfileKind, profile_type: type[AnyProfile], name: str, keys: Callable[[AnyProfile], Iterable[str]]
) -> Iterator[tuple[Path, AnyProfile]]:
    wanted = name.strip().casefold()
    for path, profile in _readable(kind, profile_type, wanted):
        if wanted in {key.casefold() for key in keys(profile)}:
            yield path, profile


_TYPES: Mapping[ProfileKind, type[Any]] = {"pipelines": PipelineProfile, "devices": DeviceProfile}
