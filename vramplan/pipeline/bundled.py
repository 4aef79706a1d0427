"""Describe a pipeline from a bundled profile: no folder, no weights, no network."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from vramplan.errors import VramplanError
from vramplan.pipeline.build import build_weightless, component_class, has_weights
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.dtypes import cast_as_loaded
from vramplan.pipeline.live import build_spec
from vramplan.pipeline.sources import Profile
from vramplan.pipeline.types import PipelineSpec
from vramplan.profiles.catalogue import _TYPES, ComponentProfile, PipelineProfile
from vramplan.profiles.files import ProfileKind, mistake_lines, mistakes, read_document, read_profile

KeyPath = tuple[str, ...]


_known: dict[tuple[str, str | None], PipelineSpec] = {}


def spec_from_profile(profile: PipelineProfile, *, dtype: str | None = None) -> PipelineSpec:
    """The spec of the profile's pipeline, loaded with `dtype` or the profile's own. Made once per process.

    A component with a dtype of its own in the profile keeps it.

    Raises:
        VramplanError: a class unknown here, or a component that has weights and no `parameters` in the profile.
    """
    key = repr(profile), dtype  # all that it is made of
    if key not in _known:
        _known[key] = _make_spec(profile, dtype)
    return _known[key]


def _make_spec(profile: PipelineProfile, dtype: str | None) -> PipelineSpec:
    cls = profile_class(profile)
    components = []
    for name, part in profile.components.items():
        if part.parameters is None:
            if has_weights(component_class(part.library, part.class_name)):
                raise VramplanError(f"profile {profile.name}: components.{name}: {_no_count(part)}")
            continue
        module = build_weightless(part.library, part.class_name, part.config)
        cast_as_loaded(module, part.dtype or dtype or profile.dtype)
        components.append(describe_component(name, module, library=part.library, pipeline=cls))
    return build_spec(cls, tuple(components), source=Profile(profile.name), family=profile.name)


def profile_class(profile: PipelineProfile) -> type:
    """The diffusers class that a profile names. Raises VramplanError if this diffusers does not have it."""
    import diffusers

    found = getattr(diffusers, profile.pipeline, None)
    if not isinstance(found, type):
        raise VramplanError(f"profile {profile.name}: diffusers {diffusers.__version__} has no {profile.pipeline}")
    return found


def contradictions(profile: PipelineProfile) -> Iterator[tuple[KeyPath, str]]:
    """Yield the errors that the installed libraries find in a profile, each with its key path in the file: an unknown
    class, a configuration key that its class does not take, a wrong number of parameters."""
    try:
        profile_class(profile)
    except VramplanError as error:
        yield ("pipeline",), str(error)
    for name, part in profile.components.items():
        for place, text in _contradictions(part):
            yield ("components", name, *place), text


def unknown_keys(part: ComponentProfile) -> list[str]:
    """The configuration keys that a component's class does not use. Raises VramplanError for an unknown class.

    For transformers' classes, keys that their code reads are known too; those without weights take any key.
    """
    cls = component_class(part.library, part.class_name)
    config, names = _config_of(cls), _config_names(cls)
    if config is None:
        return [] if part.library == "transformers" else [key for key in part.config if key not in names]
    code = inspect.getsource(sys.modules[cls.__module__])
    return [key for key in part.config if not (key in names or hasattr(config, key) or f"config.{key}" in code)]


def _contradictions(part: ComponentProfile) -> Iterator[tuple[KeyPath, str]]:
    try:
        cls = component_class(part.library, part.class_name)
    except VramplanError as error:
        yield ("class",), str(error)
        return
    unknown = unknown_keys(part)
    for key in unknown:
        near = difflib.get_close_matches(key, _config_names(cls), n=1)
        yield ("config", key), f"{part.class_name} takes no {key}" + "".join(f", but {name}" for name in near)
    if unknown or not has_weights(cls):
        return
    if part.parameters is None:
        yield (), _no_count(part)
        return
    try:
        module = build_weightless(part.library, part.class_name, part.config)
    except Exception as error:  # a class may raise anything on a wrong configuration
        reason = " ".join(str(error).split())[:200]
        yield ("config",), f"no {part.class_name} can be built from it ({reason})"
        return
    count = sum(parameter.numel() for parameter in module.parameters())
    if count != part.parameters:
        yield ("parameters",), f"{part.parameters:,}, but {part.class_name} has {count:,} as configured"


def _no_count(part: ComponentProfile) -> str:
    return f"{part.class_name} has weights: give its number of parameters"


def _config_names(cls: Any) -> Collection[str]:
    """The configuration keys of a class: arguments of diffusers' classes, keys of transformers' configurations."""
    config = _config_of(cls)
    return inspect.signature(cls).parameters.keys() if config is None else list(config.to_dict())


def _config_of(cls: Any) -> Any:
    config_class = getattr(cls, "config_class", None)
    return None if config_class is None else config_class()


def check_profile(path: Path) -> tuple[ProfileKind, tuple[str, ...]]:
    """The kind of profile in a file, judged by its keys, and a line for each mistake: in its form or, if that is valid,
    in its agreement with the installed classes."""
    try:
        document = read_document(path)
    except VramplanError as error:
        return "devices", (str(error),)
    keys = document.keys() if isinstance(document, dict) else set()
    kind = max(_TYPES, key=lambda kind: len(keys & {item.name for item in fields(_TYPES[kind])}))
    found = mistakes(path, _TYPES[kind])
    if kind == "pipelines" and not found:
        from vramplan.pipeline.bundled import contradictions

        found = mistake_lines(path, contradictions(read_profile(path, PipelineProfile)))
    if keys and document.get("name") != path.stem:
        found = (*found, f"{path}: name: it must be the name of the file: write name: {path.stem}")
    return kind, found
