"""Identify the pipeline of a single-file checkpoint by the names and shapes in its header. No weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vramplan.errors import UsageError, VramplanError
from vramplan.pipeline.build import build_weightless
from vramplan.pipeline.gguf_file import check_names, convert_names
from vramplan.pipeline.repository import Repository, StoredTensor
from vramplan.profiles.catalogue import PipelineProfile, load_pipeline_profile
from vramplan.units import format_bytes

if TYPE_CHECKING:
    import torch

# The prefixes of the names of a VAE's and of text encoders' tensors (diffusers 0.42, single_file_utils.py).
_VAE = ("first_stage_model.", "vae.")
_ENCODERS = ("cond_stage_model.", "conditioner.", "text_encoders.")
_DENOISERS = ("transformer", "unet")
# The kind that diffusers assumes for a file without any name it knows.
_FALLBACK_KIND = "v1"
_LOAD_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint in one file: the profile of its pipeline, the dtype of most of its bytes, and its parts."""

    profile: PipelineProfile
    where: str
    dtype: str
    size_bytes: int
    parts: tuple[str, ...]

    @property
    def load_dtype(self) -> str | None:
        """The default dtype for loading: its own, None if it is stored in one that is not for computing."""
        return self.dtype if self.dtype in _LOAD_DTYPES else None

    @property
    def note(self) -> str:
        """The note in a plan: the content of the file, the source of the rest, and how to load it."""
        return (
            f"{self.where} holds the {', '.join(self.parts)} of {self.profile.pipeline} "
            f"({format_bytes(self.size_bytes)}, {self.dtype}); configurations and all else are those of profile "
            f"{self.profile.name}. To apply this plan, save the file as a pipeline folder first "
            "(from_single_file, save_pretrained) and give that as `model`"
        )


def read_checkpoint(repository: Repository, path: str) -> Checkpoint:
    """Identify a safetensors file of a repository as a checkpoint, as diffusers' `from_single_file` would.

    Raises:
        VramplanError: no such file, a damaged header, or tensors of a model unknown to diffusers or the profiles.
    """
    where = repository.where(path)
    tensors, _ = repository.header(path)
    profile = _profile(where, tensors)
    denoiser = next((name for name in _DENOISERS if name in profile.components), None)
    if denoiser is None:
        raise VramplanError(f"{where}: of {profile.title} not a file but a folder or a repository can be planned for")
    part = profile.components[denoiser]
    module = build_weightless(part.library, part.class_name, part.config)
    check_names(where, module, convert_names(where, type(module), module, _meta_tensors(tensors), _config(module)))
    found = [denoiser]
    found += ["vae"] if _has_prefix(tensors, _VAE) else []
    if _has_prefix(tensors, _ENCODERS):
        found += [name for name in profile.components if name.startswith("text_enc")]
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size_bytes
    return Checkpoint(
        profile=profile,
        where=where,
        dtype=max(sizes, key=lambda name: sizes[name]),
        size_bytes=sum(sizes.values()),
        parts=tuple(found),
    )


def _profile(where: str, tensors: list[StoredTensor]) -> PipelineProfile:
    """The profile of the kind that diffusers infers. The rules read shapes of tensors that may be missing."""
    from diffusers.loaders import single_file_utils

    meta_tensors = _meta_tensors(tensors)
    try:
        kind = single_file_utils.infer_diffusers_model_type(meta_tensors)
        repo_id = single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    except Exception as error:  # a damaged or foreign file may have any shapes
        raise VramplanError(f"{where}: not a checkpoint that diffusers knows ({type(error).__name__})") from error
    if kind == _FALLBACK_KIND and single_file_utils.CHECKPOINT_KEY_NAMES[_FALLBACK_KIND] not in meta_tensors:
        raise VramplanError(f"{where}: its {len(tensors):,} tensors belong to no checkpoint that diffusers knows")
    try:
        return load_pipeline_profile(repo_id)
    except UsageError:
        raise VramplanError(
            f"{where} is a checkpoint of {repo_id}, and no profile has its configurations: plan for that repository, "
            "or for a folder made of the file (from_single_file, save_pretrained)"
        ) from None


def _meta_tensors(tensors: list[StoredTensor]) -> dict[str, torch.Tensor]:
    """Make the tensors without data, new ones each time: conversions empty the dictionary they are given."""
    import torch

    def empty(tensor: StoredTensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype, torch.uint8), device="meta")

    return {tensor.name: empty(tensor) for tensor in tensors}


def _config(module: torch.nn.Module) -> Mapping[str, object]:
    return dict(module.config)  # type: ignore[arg-type]


def _has_prefix(tensors: list[StoredTensor], prefixes: tuple[str, ...]) -> bool:
    return any(tensor.name.startswith(prefixes) for tensor in tensors)
