"""Describe a model, from whichever source it comes: a live pipeline, a folder, the hub, a bundled profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.errors import UsageError, VramplanError
from vramplan.pipeline.latents import vae_scale
from vramplan.pipeline.types import PipelineSpec
from vramplan.workload import call_defaults

if TYPE_CHECKING:
    from vramplan.pipeline.repository import Repository
    from vramplan.profiles.catalogue import PipelineProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A pipeline to plan for, and what it generates when nothing is said."""

    spec: PipelineSpec
    defaults: Mapping[str, Any]


def describe(
    model: Any,
    *,
    dtype: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> Model:
    """The model as a spec, with the defaults of its workload, from whichever source it comes.

    A name of the form `owner/name` is a repository of the hub, or, where that cannot be read, the bundled profile that
    lists it. `hub:owner/name@commit` is what a plan calls one. A name that ends in `.safetensors` is a single-file
    checkpoint, here or in a repository (`owner/name/file.safetensors`).

    Raises:
        VramplanError: what is no saved pipeline, or cannot be read. UsageError: a name that nothing goes by.
    """
    from vramplan.pipeline.dtypes import load_dtype
    from vramplan.pipeline.hub import PREFIX, is_repo_id, open_source
    from vramplan.pipeline.repository import FolderRepository

    wanted = load_dtype(dtype) if dtype else None
    stored: dict[str, Any] = {"dtype": wanted, "variant": variant, "allow_pickle": allow_pickle}
    if not isinstance(model, str | Path):
        _refuse("a pipeline that is loaded already", variant=variant, revision=revision)
        return _describe_live(model, wanted)
    if str(model).endswith((".safetensors", ".gguf")):
        _refuse("a single file", variant=variant)
        return _describe_single(str(model), revision, wanted)
    if Path(model).exists() or str(model).startswith((".", "/", "~")):
        _refuse("a local folder", revision=revision)
        return _describe_stored(FolderRepository(Path(model).expanduser()), **stored)
    if str(model).startswith(PREFIX):
        return _describe_stored(open_source(str(model)), **stored)
    if is_repo_id(str(model)):
        return _describe_named(str(model), revision, stored)
    _refuse("a profile", variant=variant, revision=revision)
    return _describe_profile(str(model), wanted)


def _describe_single(name: str, revision: str | None, dtype: str | None) -> Model:
    """A checkpoint in one file, by its header and the profile of its pipeline."""
    from vramplan.pipeline.hub import hub_repository, is_repo_id
    from vramplan.pipeline.repository import FolderRepository
    from vramplan.pipeline.single import read_single_file

    if name.endswith(".gguf"):
        raise UsageError(
            f'{name}: plan for the pipeline it is a part of: `settings={{"weights.transformer": "gguf:file={name}"}}`'
        )
    path, repo_id = Path(name).expanduser(), "/".join(name.split("/")[:2])
    if path.is_file() or not is_repo_id(repo_id) or name.count("/") < 2:
        _refuse("a file on this machine", revision=revision)
        single = read_single_file(FolderRepository(path.parent), path.name)
    else:
        single = read_single_file(hub_repository(repo_id, revision), name.removeprefix(f"{repo_id}/"))
    described = _describe_profile(single.profile.name, dtype or single.load_dtype)
    return replace(described, spec=replace(described.spec, notes=(*described.spec.notes, single.note)))


def _refuse(what: str, **given: str | None) -> None:
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{name} {value}: {what} has none to choose from")


def _describe_named(repo_id: str, revision: str | None, stored: Mapping[str, Any]) -> Model:
    """What the hub holds under this name, else the profile that lists it."""
    from vramplan.pipeline.hub import hub_repository
    from vramplan.pipeline.hub_http import HubError, is_offline

    profile = _profile_of(repo_id)
    try:
        repository = hub_repository(repo_id, revision)
    except HubError as error:
        if profile is None and is_offline():
            raise UsageError(f"{repo_id}: no such folder, no pipeline profile lists it, and {error}") from error
        if profile is None or revision is not None or stored["variant"] is not None:
            raise
        note = f"sizes are those of profile {profile.name}; the repository was not read: {error}"
        described = _describe_profile(profile.name, stored["dtype"])
        return replace(described, spec=replace(described.spec, notes=(*described.spec.notes, note)))
    described = _describe_stored(repository, **stored)
    return replace(described, defaults={**described.defaults, **(_workload(profile) if profile else {})})


def _profile_of(repo_id: str) -> PipelineProfile | None:
    from vramplan.profiles.catalogue import load_pipeline_profile

    try:
        return load_pipeline_profile(repo_id)
    except UsageError:
        return None


def _describe_live(pipe: Any, dtype: str | None) -> Model:
    from vramplan.pipeline.live import spec_from_pipeline
    from vramplan.pipeline.modules import modules_of

    if dtype is not None:
        raise UsageError("dtype is for a pipeline that is still to be loaded; a live one keeps its own")
    if not hasattr(pipe, "components"):
        raise VramplanError(f"{type(pipe).__name__} is not a diffusers pipeline: it has no components")
    if not modules_of(pipe):
        raise VramplanError(f"{type(pipe).__name__} has no modules to place")
    spec = spec_from_pipeline(pipe)
    return Model(spec=spec, defaults=_defaults(type(pipe), spec))


def _describe_stored(repository: Repository, **options: Any) -> Model:
    from vramplan.pipeline.folder import pipeline_class, read_index, spec_from_repository

    spec = spec_from_repository(repository, **options)
    if not spec.components:
        raise VramplanError(f"{repository.where('')}: its model_index.json names no module to place")
    return Model(spec=spec, defaults=_defaults(pipeline_class(repository, read_index(repository)), spec))


def _describe_profile(name: str, dtype: str | None) -> Model:
    from vramplan.pipeline.bundled import profile_class, spec_from_profile
    from vramplan.profiles.catalogue import load_pipeline_profile

    try:
        profile = load_pipeline_profile(name)
    except UsageError as error:
        raise UsageError(f"{name}: no such folder, and {error}") from None
    spec = spec_from_profile(profile, dtype=dtype)
    return Model(spec=spec, defaults=_defaults(profile_class(profile), spec) | _workload(profile))


def _workload(profile: PipelineProfile) -> dict[str, Any]:
    told = profile.workload
    own = {
        "height": told.height,
        "width": told.width,
        "num_inference_steps": told.num_inference_steps,
        "guidance_scale": told.guidance_scale,
        "num_images_per_prompt": told.batch,
    }
    return own | ({"num_frames": told.num_frames} if told.num_frames else {})


def _defaults(cls: type, spec: PipelineSpec) -> dict[str, Any]:
    denoiser = next((component for component in spec.components if component.role == "denoiser"), None)
    spatial, _ = vae_scale(next(iter(spec.vaes), None))
    return call_defaults(cls, denoiser.config if denoiser else {}, spatial, sound=spec.sound)
