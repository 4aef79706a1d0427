"""Load a plan's pipeline from its folder: one component at a time, each placed before the next is loaded.

A failed or interrupted load leaves nothing in memory, since nothing else holds the components; the error names the one.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vramplan.common.progress import Say, byte_progress, say_above_bars
from vramplan.errors import UsageError, VramplanError
from vramplan.pipeline.types import PipelineSpec
from vramplan.planner.loading import Load, load_of, load_order
from vramplan.strategies.base import AtLoad, Decodes, Execution, Placed, Placement, Weights, missing_package
from vramplan.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStages:
    """A plan's settings, staged by when they apply during loading.

    `loads` are the components in loading order.
    """

    spec: PipelineSpec
    placed: Placed
    decodes: Decodes
    loads: Mapping[str, Load]

    @property
    def first(self) -> list[str]:
        """The components that encode the prompt and are freed before the others are loaded."""
        return [name for name, load in self.loads.items() if load.freed]

    @property
    def rest(self) -> list[str]:
        """The components that stay."""
        return [name for name in self.loads if name not in self.first]

    @property
    def deferred(self) -> Placed:
        """The settings to apply once all is loaded: those of the whole pipeline, and those that take no memory.

        Undoing restores the state before them, so they are applied when that state can be read.
        """
        if any(isinstance(setting, Placement) and setting.whole_pipeline for setting, _ in self.placed):
            return self.placed
        return [(setting, names) for setting, names in self.placed if isinstance(setting, Execution)]

    def settings_of(self, name: str) -> Iterable[Weights | Placement | Execution]:
        """The settings to apply to a component as soon as it is loaded."""
        deferred = [setting for setting, _ in self.deferred]
        return (setting for setting, names in self.placed if name in names and setting not in deferred)

    def options(self, name: str) -> dict[str, Any]:
        """Additional arguments for loading the component's weights.

        Raises:
            UsageError: a package that a setting needs is not installed.
        """
        setting = self._at_load(name)
        missing = missing_package(setting.name) if setting else None
        if missing is not None:
            raise UsageError(f"settings.weights.{name}: {missing}")
        return setting.load(self.spec.component(name)) if setting else {}

    def source(self, name: str) -> Path | None:
        """The file to load its weights from; None for the component's own folder."""
        setting = self._at_load(name)
        return setting.source if setting else None

    def returns(self, name: str) -> bool:
        """Whether the component has to leave the device once it is loaded, as it is placed with all others at last."""
        setting = self._at_load(name)
        whole = any(
            isinstance(item, Placement) and item.whole_pipeline and name in names for item, names in self.deferred
        )
        return whole and setting is not None and setting.loads_on_device

    def _at_load(self, name: str) -> AtLoad | None:
        found = (setting for setting, names in self.placed if isinstance(setting, AtLoad) and name in names)
        return next(found, None)


def stage_settings(spec: PipelineSpec, placed: Placed, decodes: Decodes) -> LoadStages:
    """Stage the settings of a pipeline not loaded yet, in the order to load and place them."""
    cast = {name for setting, names in placed if setting.axis == "weights" for name in names}
    loads = {}
    for setting, names in placed:
        if not isinstance(setting, Placement):
            continue
        for name in names:
            component = spec.component(name)
            load = load_of(component, setting, setting.hold(component, spec))
            loads[name] = load if name not in cast else _through_host(load, component.weight_bytes)
    order = load_order(loads)
    return LoadStages(spec=spec, placed=placed, decodes=decodes, loads={name: loads[name] for name in order})


def _through_host(load: Load, size: int) -> Load:
    """The load with its weights in RAM first, where they are changed after loading."""
    return Load(peak_bytes=max(load.peak_bytes, size), kept_bytes=load.kept_bytes, direct=False, freed=load.freed)


def load_component(
    folder: Path,
    name: str,
    library: str,
    class_name: str,
    *,
    dtype: str,
    device: str | None,
    options: Mapping[str, Any],
    source: Path | None = None,
    allow_pickle: bool = False,
) -> Any:
    """Load one component from its own folder in this dtype, onto the device if one is given, else into RAM.

    `options` are passed to its `from_pretrained`, or to `from_single_file` if its weights are in `source`.

    Raises:
        VramplanError: its files are damaged or missing; the message names the component.
    """
    import diffusers

    from vramplan.pipeline.build import component_class
    from vramplan.pipeline.dtypes import torch_dtype

    given: dict[str, Any] = {"dtype": torch_dtype(dtype), "local_files_only": True, **options}
    cls = component_class(library, class_name)
    try:
        if source is not None:
            return cls.from_single_file(str(source), config=str(folder / name), **given)
        where = {"device_map": {"": device}} if device else {}
        return cls.from_pretrained(str(folder / name), use_safetensors=None if allow_pickle else True, **where, **given)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        if _is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise VramplanError(
            f"{name}: diffusers {diffusers.__version__} cannot load {source or folder / name}: {reason}"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def load_components(
    folder: Path,
    stages: LoadStages,
    names: Sequence[str],
    device: str,
    *,
    allow_pickle: bool = False,
    say: Say,
) -> dict[str, Any]:
    """Load the named components in the given order, each placed before the next is loaded."""
    modules: dict[str, Any] = {}
    sizes = {name: stages.spec.component(name).weight_bytes for name in names}
    log = say_above_bars(say)
    with byte_progress("loading", sum(sizes.values())) as advance:
        for name in names:
            modules[name] = _load_placed(folder, stages, name, device, allow_pickle=allow_pickle, say=log)
            advance(sizes[name])
    return modules


def _load_placed(folder: Path, stages: LoadStages, name: str, device: str, *, allow_pickle: bool, say: Say) -> Any:
    """Load one component and apply its settings."""
    record = stages.spec.component(name)
    direct = stages.loads[name].direct and device.partition(":")[0] != "cpu"
    where = f" to {device}" if direct else ""
    say(f"loading {name}{where}: {format_bytes(record.weight_bytes)}")
    module = load_component(
        folder,
        name,
        record.library,
        record.class_name,
        dtype=record.dtype,
        device=device if direct else None,
        options=stages.options(name) | ({"variant": record.variant} if record.variant else {}),
        source=stages.source(name),
        allow_pickle=allow_pickle,
    )
    if stages.returns(name):
        module.to("cpu")  # or all such components would be on the device before the plan is applied
    stand_in = SimpleNamespace(components={name: module})
    for setting in stages.settings_of(name):
        setting.apply(stand_in, [name], device)
    release_memory()
    return module


def assemble_pipeline(folder: Path, modules: Mapping[str, Any]) -> Any:
    """Assemble the pipeline from these modules; tokenizers, schedulers and the like come from the folder.

    Raises:
        VramplanError: the folder does not hold that pipeline, or a part of it is damaged.
    """
    import diffusers

    from vramplan.pipeline.folder import pipeline_class, read_index
    from vramplan.pipeline.repository import FolderRepository

    repository = FolderRepository(folder)
    cls = pipeline_class(repository, read_index(repository))
    try:
        return cls.from_pretrained(folder, local_files_only=True, **modules)  # type: ignore[attr-defined]
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise VramplanError(f"{folder}: diffusers {diffusers.__version__} cannot load it: {reason}") from error


def weightless_modules(folder: Path, spec: PipelineSpec, names: Iterable[str]) -> dict[str, Any]:
    """Build modules without weights, in place of those not loaded yet."""
    from vramplan.pipeline.folder import weightless_component
    from vramplan.pipeline.repository import FolderRepository

    repository = FolderRepository(folder)
    parts = [spec.component(name) for name in names]
    return {
        part.name: weightless_component(
            repository, part.name, part.library, part.class_name, part.dtype, variant=part.variant
        )
        for part in parts
    }


def check_prompt(stages: LoadStages, prompt: object) -> None:
    """Raise UsageError if the plan encodes the prompt first and none is given."""
    if stages.first and prompt is None:
        raise UsageError(f"the plan encodes the prompt first and drops {', '.join(stages.first)}: give `prompt`")


def release_memory() -> None:
    """Return unreferenced memory to the system and the device.

    glibc keeps freed memory: 1.2 GiB after converting a 3.2 GiB UNet to float32 (measured), 0.05 GiB after a trim.
    """
    import ctypes

    import torch

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()
        free_page_locked = getattr(torch.accelerator.memory, "empty_host_cache", None)  # not in every torch
        if free_page_locked is not None:
            free_page_locked()
