"""Describe a model from any source: a live pipeline, a folder, the hub, a profile, a single file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.common.cache import Codec, cached, json_codec
from vramplan.errors import UsageError, VramplanError
from vramplan.pipeline.latents import vae_scale
from vramplan.pipeline.sources import Folder, Hub, Live, SingleFile, is_repo_id, refuse_options, source_of
from vramplan.pipeline.types import PipelineSpec
from vramplan.workload import call_defaults

if TYPE_CHECKING:
    from vramplan.pipeline.repository import Repository
    from vramplan.profiles.catalogue import PipelineProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A described pipeline, and the defaults of its workload."""

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
    """Describe the model: its spec, and the defaults of its workload.

    `model` is a `Source`, or a value that `source_of` accepts. A repository of the hub that cannot be read is described
    by the profile that lists it.

    Raises:
        VramplanError: not a pipeline, or one that cannot be read. UsageError: an unknown name.
    """
    from vramplan.pipeline.dtypes import load_dtype
    from vramplan.pipeline.hub import open_repository

    wanted = load_dtype(dtype) if dtype else None
    stored: dict[str, Any] = {"dtype": wanted, "variant": variant, "allow_pickle": allow_pickle}
    source = source_of(model, revision)
    if isinstance(source, Live):
        refuse_options("a pipeline that is loaded already", source, variant=variant)
        return _describe_live(source, wanted)
    if isinstance(source, SingleFile):
        refuse_options("a single file", source, variant=variant)
        return _describe_single(source, wanted)
    if isinstance(source, Folder):
        return _describe_stored(open_repository(source), **stored)
    if isinstance(source, Hub):
        return _describe_hub(source, stored)
    refuse_options("a profile", source, variant=variant)
    return _describe_profile(source.name, wanted)


def _describe_single(source: SingleFile, dtype: str | None) -> Model:
    """Describe a checkpoint in one file, by its header and the profile of its pipeline."""
    from vramplan.pipeline.hub import open_repository
    from vramplan.pipeline.single import read_checkpoint

    name = source.path
    if name.endswith(".gguf"):
        raise UsageError(
            f'{name}: plan for the pipeline it is a part of: `settings={{"weights.transformer": "gguf:file={name}"}}`'
        )
    path, repo_id = Path(name).expanduser(), "/".join(name.split("/")[:2])
    if path.is_file() or not is_repo_id(repo_id) or name.count("/") < 2:
        refuse_options("a file on this machine", source, revision=source.revision)
        checkpoint = read_checkpoint(open_repository(Folder(path.parent)), path.name)
    else:
        repository = open_repository(Hub(repo_id, source.revision))
        checkpoint = read_checkpoint(repository, name.removeprefix(f"{repo_id}/"))
    described = _describe_profile(checkpoint.profile.name, dtype or checkpoint.load_dtype)
    return _with_note(described, checkpoint.note)


def _with_note(described: Model, note: str) -> Model:
    return replace(described, spec=replace(described.spec, notes=(*described.spec.notes, note)))


def _describe_hub(source: Hub, stored: Mapping[str, Any]) -> Model:
    """Describe a repository, or the profile that lists it if the hub cannot be read."""
    from vramplan.pipeline.hub import open_repository
    from vramplan.pipeline.hub_http import HubError, is_offline

    profile = _profile_of(source.repo_id)
    try:
        repository = open_repository(source)
    except HubError as error:
        if profile is None and is_offline():
            raise UsageError(f"{source.repo_id}: no such folder, no pipeline profile lists it, and {error}") from error
        if profile is None or source.revision is not None or stored["variant"] is not None:
            raise
        note = f"sizes are those of profile {profile.name}; the repository was not read: {error}"
        return _with_note(_describe_profile(profile.name, stored["dtype"]), note)
    described = _describe_stored(repository, **stored)
    return replace(described, defaults={**described.defaults, **(_workload(profile) if profile else {})})


def _profile_of(repo_id: str) -> PipelineProfile | None:
    from vramplan.profiles.catalogue import load_pipeline_profile

    try:
        return load_pipeline_profile(repo_id)
    except UsageError:
        return None


def _describe_live(source: Live, dtype: str | None) -> Model:
    from vramplan.pipeline.live import spec_from_pipeline
    from vramplan.pipeline.modules import modules_of

    pipe = source.pipe
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
    from vramplan.profiles.catalogue import load_pipeline_profile
    from vramplan.profiles.recorded import recorded

    try:
        profile = load_pipeline_profile(name)
    except UsageError as error:
        raise UsageError(f"{name}: no such folder, and {error}") from None
    key = {"described": repr(profile), "dtype": dtype}  # all that it is made of
    shipped = recorded(profile.name)
    codec: Codec[Model] = json_codec(Model)
    return cached(key, lambda: _made_from_profile(profile, dtype), codec, module=__name__, shipped=shipped)


def _made_from_profile(profile: PipelineProfile, dtype: str | None) -> Model:
    from vramplan.pipeline.bundled import profile_class, spec_from_profile

    spec = spec_from_profile(profile, dtype=dtype)
    return Model(spec=spec, defaults=_defaults(profile_class(profile), spec) | _workload(profile))


def _workload(profile: PipelineProfile) -> dict[str, Any]:
    usual = profile.workload
    own = {
        "height": usual.height,
        "width": usual.width,
        "num_inference_steps": usual.num_inference_steps,
        "guidance_scale": usual.guidance_scale,
        "num_images_per_prompt": usual.batch,
    }
    return own | ({"num_frames": usual.num_frames} if usual.num_frames else {})


def _defaults(cls: type, spec: PipelineSpec) -> dict[str, Any]:
    denoiser = next((component for component in spec.components if component.role == "denoiser"), None)
    spatial, _ = vae_scale(next(iter(spec.vaes), None))
    return call_defaults(cls, denoiser.config if denoiser else {}, spatial, sound=spec.sound)
