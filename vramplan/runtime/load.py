"""Load a plan's pipeline from its folder: one component at a time, each placed before the next is loaded.

A failed or interrupted load leaves nothing: what was loaded is held by nobody else, and the error names the component.
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
class Staged:
    """A plan's settings in the order they are made so while loading.

    `loads` are the components in the order they are loaded. `whole` are settings of the pipeline as one.
    """

    spec: PipelineSpec
    placed: Placed
    decodes: Decodes
    loads: Mapping[str, Load]

    @property
    def first(self) -> list[str]:
        """The components that encode the prompt and are gone before the others are loaded."""
        return [name for name, load in self.loads.items() if load.freed]

    @property
    def rest(self) -> list[str]:
        """The components that stay."""
        return [name for name in self.loads if name not in self.first]

    @property
    def late(self) -> Placed:
        """The settings to put on once all of it is loaded: those of the pipeline as one, and those that take no memory.

        Undoing puts back what was before them, so that they come when that can be read.
        """
        if any(isinstance(setting, Placement) and setting.whole_pipeline for setting, _ in self.placed):
            return self.placed
        return [(setting, names) for setting, names in self.placed if isinstance(setting, Execution)]

    def of(self, name: str) -> Iterable[Weights | Placement | Execution]:
        """The settings to put on a component as soon as it is loaded."""
        late = [setting for setting, _ in self.late]
        return (setting for setting, names in self.placed if name in names and setting not in late)

    def options(self, name: str) -> dict[str, Any]:
        """What its weights have to be loaded with.

        Raises:
            UsageError: a package that a setting needs is not installed.
        """
        setting = self._at_load(name)
        missing = missing_package(setting.name) if setting else None
        if missing is not None:
            raise UsageError(f"settings.weights.{name}: {missing}")
        return setting.load(self.spec.component(name)) if setting else {}

    def source(self, name: str) -> Path | None:
        """The file that its weights are loaded from, None where that is its own folder's."""
        setting = self._at_load(name)
        return setting.source if setting else None

    def returns(self, name: str) -> bool:
        """Whether the component has to leave the device once it is loaded, as it is placed with all others at last."""
        setting = self._at_load(name)
        whole = any(isinstance(item, Placement) and item.whole_pipeline and name in names for item, names in self.late)
        return whole and setting is not None and setting.loads_on_device

    def _at_load(self, name: str) -> AtLoad | None:
        found = (setting for setting, names in self.placed if isinstance(setting, AtLoad) and name in names)
        return next(found, None)


def staged(spec: PipelineSpec, placed: Placed, decodes: Decodes) -> Staged:
    """The settings of a pipeline that is still to be loaded, in the order to load and place them."""
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
    return Staged(spec=spec, placed=placed, decodes=decodes, loads={name: loads[name] for name in order})


def _through_host(load: Load, size: int) -> Load:
    """What is done to weights once they are loaded is done in RAM."""
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
    """One component from its own folder in this dtype: on the device where one is given, else in RAM.

    `options` are more arguments for its `from_pretrained`, or for `from_single_file` where its weights are in `source`.

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
        if _out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise VramplanError(
            f"{name}: diffusers {diffusers.__version__} cannot load {source or folder / name}: {reason}"
        ) from error


def _out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def load_components(
    folder: Path,
    stages: Staged,
    names: Sequence[str],
    device: str,
    *,
    allow_pickle: bool = False,
    say: Say,
) -> dict[str, Any]:
    """The components of these names, in the order of the stages, each placed before the next is loaded."""
    modules: dict[str, Any] = {}
    sizes = {name: stages.spec.component(name).weight_bytes for name in names}
    tell = say_above_bars(say)
    with byte_progress("loading", sum(sizes.values())) as moved:
        for name in names:
            modules[name] = _load_placed(folder, stages, name, device, allow_pickle=allow_pickle, say=tell)
            moved(sizes[name])
    return modules


def _load_placed(folder: Path, stages: Staged, name: str, device: str, *, allow_pickle: bool, say: Say) -> Any:
    """One component with the settings it is to have."""
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
    for setting in stages.of(name):
        setting.apply(stand_in, [name], device)
    release_memory()
    return module


def assemble_pipeline(folder: Path, modules: Mapping[str, Any]) -> Any:
    """The pipeline of these modules; tokenizers, schedulers and the like from the folder.

    Raises:
        VramplanError: the folder is not that pipeline, or a part of it is damaged.
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


def weightless(folder: Path, spec: PipelineSpec, names: Iterable[str]) -> dict[str, Any]:
    """Modules without weights, in place of those that are not loaded yet."""
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


def check_prompt(stages: Staged, prompt: object) -> None:
    """Raises UsageError where the plan encodes a prompt first and there is none."""
    if stages.first and prompt is None:
        raise UsageError(f"the plan encodes the prompt first and drops {', '.join(stages.first)}: give `prompt`")


def release_memory() -> None:
    """Give back the memory of what nobody holds any more.

    glibc keeps what it freed: 1.2 GiB of it after converting a 3.2 GiB UNet to float32 (measured), 0.05 GiB once told.
    """
    import ctypes

    import torch

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()
