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
from vramplan.pipeline.live import assemble
from vramplan.pipeline.types import PipelineSpec
from vramplan.profiles.catalogue import _TYPES, ComponentProfile, PipelineProfile
from vramplan.profiles.files import ProfileKind, mistake_lines, mistakes, read_document, read_profile

KeyPath = tuple[str, ...]


def spec_from_profile(profile: PipelineProfile, *, dtype: str | None = None) -> PipelineSpec:
    """The description of the pipeline the profile stands for, loaded with `dtype` or the profile's own.

    A component that has a dtype of its own in the profile keeps it.

    Raises:
        VramplanError: a class unknown here, or a component that has weights and no `parameters` in the profile.
    """
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
    return assemble(cls, tuple(components), source=f"profile:{profile.name}", family=profile.name)


def profile_class(profile: PipelineProfile) -> type:
    """The diffusers class a profile names. Raises VramplanError where this diffusers does not have it."""
    import diffusers

    found = getattr(diffusers, profile.pipeline, None)
    if not isinstance(found, type):
        raise VramplanError(f"profile {profile.name}: diffusers {diffusers.__version__} has no {profile.pipeline}")
    return found


def contradictions(profile: PipelineProfile) -> Iterator[tuple[KeyPath, str]]:
    """What the installed libraries say against a profile, each with its place in the file: a class they do not have, a
    key of a configuration that its class does not take, another number of parameters than the class has."""
    try:
        profile_class(profile)
    except VramplanError as error:
        yield ("pipeline",), str(error)
    for name, part in profile.components.items():
        for place, text in _contradictions(part):
            yield ("components", name, *place), text


def unknown_keys(part: ComponentProfile) -> list[str]:
    """The keys of a component's configuration that its class does nothing with. Raises VramplanError without a class.

    Of transformers' classes those are known too that their code reads; what has no weights there takes anything.
    """
    cls = component_class(part.library, part.class_name)
    config, names = _config_of(cls), _names(cls)
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
        near = difflib.get_close_matches(key, _names(cls), n=1)
        yield ("config", key), f"{part.class_name} takes no {key}" + "".join(f", but {name}" for name in near)
    if unknown or not has_weights(cls):
        return
    if part.parameters is None:
        yield (), _no_count(part)
        return
    try:
        module = build_weightless(part.library, part.class_name, part.config)
    except Exception as error:  # what a wrong configuration makes a class raise is anybody's guess
        reason = " ".join(str(error).split())[:200]
        yield ("config",), f"no {part.class_name} can be built from it ({reason})"
        return
    count = sum(parameter.numel() for parameter in module.parameters())
    if count != part.parameters:
        yield ("parameters",), f"{part.parameters:,}, but {part.class_name} has {count:,} as configured"


def _no_count(part: ComponentProfile) -> str:
    return f"{part.class_name} has weights: give its number of parameters"


def _names(cls: Any) -> Collection[str]:
    """What a class is configured with: arguments of diffusers' classes, keys of transformers' configurations."""
    config = _config_of(cls)
    return inspect.signature(cls).parameters.keys() if config is None else list(config.to_dict())


def _config_of(cls: Any) -> Any:
    config_class = getattr(cls, "config_class", None)
    return None if config_class is None else config_class()


def check_profile(path: Path) -> tuple[ProfileKind, tuple[str, ...]]:
    """Which kind of profile a file is to be, going by its keys, and a line for each mistake in it: in its form, and,
    where that is right, in what it says of the classes that are installed here."""
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
        found = (*found, f"{path}: name: it goes by the name of its file: write name: {path.stem}")
    return kind, found
