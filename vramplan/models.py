"""Describe a model, from whichever source it comes: a live pipeline, a folder, a bundled profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vramplan.errors import UsageError, VramplanError
from vramplan.pipeline.types import PipelineSpec
from vramplan.planner.footprint import vae_scale
from vramplan.workload import call_defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A pipeline to plan for, and what it generates when nothing is said."""

    spec: PipelineSpec
    defaults: Mapping[str, Any]


def describe(model: Any, *, dtype: str | None = None, allow_pickle: bool = False) -> Model:
    """The model as a spec, with the defaults of its workload, from whichever source it comes.

    Raises:
        VramplanError: a folder that is no pipeline. UsageError: a name that nothing goes by.
    """
    from vramplan.pipeline.dtypes import load_dtype

    wanted = load_dtype(dtype) if dtype else None
    if not isinstance(model, str | Path):
        return _describe_live(model, wanted)
    if Path(model).exists() or str(model).startswith((".", "/", "~")):
        return _describe_folder(Path(model).expanduser(), wanted, allow_pickle=allow_pickle)
    return _describe_profile(str(model), wanted)


def _describe_live(pipe: Any, dtype: str | None) -> Model:
    from vramplan.pipeline.live import modules_of, spec_from_pipeline

    if dtype is not None:
        raise UsageError("dtype is for a pipeline that is still to be loaded; a live one keeps its own")
    if not hasattr(pipe, "components"):
        raise VramplanError(f"{type(pipe).__name__} is not a diffusers pipeline: it has no components")
    if not modules_of(pipe):
        raise VramplanError(f"{type(pipe).__name__} has no modules to place")
    spec = spec_from_pipeline(pipe)
    return Model(spec=spec, defaults=_defaults(type(pipe), spec))


def _describe_folder(folder: Path, dtype: str | None, *, allow_pickle: bool) -> Model:
    from vramplan.pipeline.folder import pipeline_class, read_index, spec_from_folder

    spec = spec_from_folder(folder, dtype=dtype, allow_pickle=allow_pickle)
    if not spec.components:
        raise VramplanError(f"{folder}: its model_index.json names no module to place")
    return Model(spec=spec, defaults=_defaults(pipeline_class(folder, read_index(folder)), spec))


def _describe_profile(name: str, dtype: str | None) -> Model:
    from vramplan.pipeline.bundled import profile_class, spec_from_profile
    from vramplan.profiles import load_pipeline_profile

    try:
        profile = load_pipeline_profile(name)
    except UsageError as error:
        raise UsageError(f"{name}: no such folder, and {error}") from None
    spec = spec_from_profile(profile, dtype=dtype)
    told = profile.workload
    own = {
        "height": told.height,
        "width": told.width,
        "num_inference_steps": told.num_inference_steps,
        "guidance_scale": told.guidance_scale,
        "num_images_per_prompt": told.batch,
    }
    own |= {"num_frames": told.num_frames} if told.num_frames else {}
    return Model(spec=spec, defaults=_defaults(profile_class(profile), spec) | own)


def _defaults(cls: type, spec: PipelineSpec) -> dict[str, Any]:
    denoiser = next((component for component in spec.components if component.role == "denoiser"), None)
    spatial, _ = vae_scale(next(iter(spec.vaes), None))
    return call_defaults(cls, denoiser.config if denoiser else {}, spatial)
