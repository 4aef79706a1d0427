"""A single-file checkpoint: which pipeline it is of, by the names and shapes in its header. No weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vramplan.errors import UsageError, VramplanError
from vramplan.pipeline.build import build_weightless
from vramplan.pipeline.ggufs import check_names, converted
from vramplan.pipeline.repository import Repository, StoredTensor
from vramplan.profiles.catalogue import PipelineProfile, load_pipeline_profile
from vramplan.units import format_bytes

if TYPE_CHECKING:
    import torch

# What precedes the names of a VAE's and of text encoders' tensors (diffusers 0.42, single_file_utils.py).
_VAE = ("first_stage_model.", "vae.")
_ENCODERS = ("cond_stage_model.", "conditioner.", "text_encoders.")
_DENOISERS = ("transformer", "unet")
# What diffusers takes a file for that has the names of nothing it knows.
_FALLBACK = "v1"
_LOADED = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleFile:
    """A checkpoint in one file: the profile of its pipeline, the dtype that most of it is stored in, and its parts."""

    profile: PipelineProfile
    where: str
    dtype: str
    size_bytes: int
    parts: tuple[str, ...]

    @property
    def load_dtype(self) -> str | None:
        """The dtype to load it in where nothing is said: its own, None where it is stored in another kind."""
        return self.dtype if self.dtype in _LOADED else None

    @property
    def note(self) -> str:
        """What a plan says of it: what it holds, where the rest comes from, and how to load it."""
        return (
            f"{self.where} holds the {', '.join(self.parts)} of {self.profile.pipeline} "
            f"({format_bytes(self.size_bytes)}, {self.dtype}); configurations and all else are those of profile "
            f"{self.profile.name}. To apply this plan, save the file as a pipeline folder first "
            "(from_single_file, save_pretrained) and give that as `model`"
        )


def read_single_file(repository: Repository, path: str) -> SingleFile:
    """What a safetensors file of a repository is as a checkpoint, as diffusers' `from_single_file` takes it.

    Raises:
        VramplanError: no such file, a damaged header, or tensors that are of nothing diffusers or a profile knows.
    """
    where = repository.where(path)
    tensors, _ = repository.header(path)
    profile = _profile(where, tensors)
    denoiser = next((name for name in _DENOISERS if name in profile.components), None)
    if denoiser is None:
        raise VramplanError(f"{where}: of {profile.title} not a file but a folder or a repository can be planned for")
    part = profile.components[denoiser]
    module = build_weightless(part.library, part.class_name, part.config)
    check_names(where, module, converted(where, type(module), module, _hollow(tensors), _config(module)))
    found = [denoiser]
    found += ["vae"] if _any(tensors, _VAE) else []
    found += [name for name in profile.components if name.startswith("text_enc")] if _any(tensors, _ENCODERS) else []
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size_bytes
    return SingleFile(
        profile=profile,
        where=where,
        dtype=max(sizes, key=lambda name: sizes[name]),
        size_bytes=sum(sizes.values()),
        parts=tuple(found),
    )


def _profile(where: str, tensors: list[StoredTensor]) -> PipelineProfile:
    """The profile of what diffusers takes the file for. Its rules read shapes of tensors it expects to be there."""
    from diffusers.loaders import single_file_utils

    hollow = _hollow(tensors)
    try:
        kind = single_file_utils.infer_diffusers_model_type(hollow)
        repo_id = single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    except Exception as error:  # whatever shapes a damaged or foreign file has
        raise VramplanError(f"{where}: not a checkpoint that diffusers knows ({type(error).__name__})") from error
    if kind == _FALLBACK and single_file_utils.CHECKPOINT_KEY_NAMES[_FALLBACK] not in hollow:
        raise VramplanError(f"{where}: its {len(tensors):,} tensors are of no checkpoint that diffusers knows")
    try:
        return load_pipeline_profile(repo_id)
    except UsageError:
        raise VramplanError(
            f"{where} is a checkpoint of {repo_id}, and no profile has its configurations: plan for that repository, "
            "or for a folder made of the file (from_single_file, save_pretrained)"
        ) from None


def _hollow(tensors: list[StoredTensor]) -> dict[str, torch.Tensor]:
    """The tensors without data, anew: conversions take what they are given apart."""
    import torch

    def empty(tensor: StoredTensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype, torch.uint8), device="meta")

    return {tensor.name: empty(tensor) for tensor in tensors}


def _config(module: torch.nn.Module) -> Mapping[str, object]:
    return dict(module.config)  # type: ignore[arg-type]


def _any(tensors: list[StoredTensor], prefixes: tuple[str, ...]) -> bool:
    return any(tensor.name.startswith(prefixes) for tensor in tensors)
