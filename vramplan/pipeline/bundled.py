"""Describe a pipeline from a bundled profile: no folder, no weights, no network."""

from __future__ import annotations

from vramplan.errors import VramplanError
from vramplan.pipeline.build import build_weightless
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.dtypes import cast_as_loaded
from vramplan.pipeline.live import assemble
from vramplan.pipeline.types import PipelineSpec
from vramplan.profiles import PipelineProfile


def spec_from_profile(profile: PipelineProfile, *, dtype: str | None = None) -> PipelineSpec:
    """The description of the pipeline the profile stands for, loaded with `dtype` or the profile's own.

    A component that has a dtype of its own in the profile keeps it.
    """
    cls = profile_class(profile)
    components = []
    for name, part in profile.components.items():
        if part.parameters is None:
            continue
        module = build_weightless(part.library, part.class_name, part.config)
        cast_as_loaded(module, part.dtype or dtype or profile.dtype)
        components.append(describe_component(name, module, library=part.library, pipeline=cls))
    return assemble(cls, tuple(components), source=f"profile:{profile.name}", family=profile.name)


def profile_class(profile: PipelineProfile) -> type:
    """The diffusers class a profile names. Raises VramplanError where this diffusers does not have it."""
    import diffusers

    found = getattr(diffusers, profile.pipeline, None)
    if not isinstance(found, type):
        raise VramplanError(f"profile {profile.name}: diffusers {diffusers.__version__} has no {profile.pipeline}")
    return found
