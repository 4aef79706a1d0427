"""Apply a plan while loading its pipeline: encode first if the plan says so, then load and place the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vramplan.common.progress import Say
from vramplan.pipeline.folder import spec_from_folder
from vramplan.pipeline.prompt import Encoded, check_encodings, encode
from vramplan.pipeline.types import PipelineSpec
from vramplan.planfile.match import check_match, parse_settings
from vramplan.planfile.types import Plan, load_options
from vramplan.runtime.applied import Applied, check_device, finish_applying, planned_accelerator
from vramplan.runtime.load import (
    LoadStages,
    assemble_pipeline,
    check_prompt,
    load_components,
    release_memory,
    stage_settings,
    weightless_modules,
)
from vramplan.strategies.base import freed_first


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPipeline:
    """A pipeline under its plan, and the arguments of its call, with the prompt encoded if the plan encodes first."""

    applied: Applied
    arguments: Mapping[str, Any]
    encoded: Encoded | None = None

    @contextmanager
    def checking_encodings(self) -> Iterator[None]:
        """Context manager: the call fails if the pipeline uses other embeddings than it would have made itself."""
        with check_encodings(self.applied.pipe, self.encoded) if self.encoded else nullcontext():
            yield

    def __call__(self) -> Any:
        """Call the pipeline and return its result."""
        with self.checking_encodings():
            return self.applied.pipe(**self.arguments)


def load_stages(
    plan: Plan, folder: Path, device: str, *, spec: PipelineSpec | None = None, allow_pickle: bool = False
) -> LoadStages:
    """Stage the plan's settings for the pipeline in this folder; only configurations and headers are read.

    Raises:
        MismatchError: the folder holds another pipeline. UsageError: an edited setting is not possible.
    """
    spec = spec or spec_from_folder(folder, allow_pickle=allow_pickle, **load_options(plan))
    check_match(spec, plan)
    return stage_settings(spec, *parse_settings(plan, spec, planned_accelerator(plan, device)))


def load_applied(
    plan: Plan,
    folder: Path,
    arguments: Callable[[Any], Mapping[str, Any]] | None,
    *,
    spec: PipelineSpec | None = None,
    device: str | None = None,
    allow_pickle: bool = False,
    say: Say,
) -> LoadedPipeline:
    """Load the plan's pipeline from the folder and apply the plan. `arguments` makes the arguments of the call;
    `spec` describes the folder, if the caller has described it.

    Raises:
        VramplanError: a component cannot be loaded; nothing stays loaded.
        MismatchError: the plan is for another pipeline, or for a device that is not here.
    """
    target = device or plan.machine.device
    check_device(target, plan)
    stages = load_stages(plan, folder, target, spec=spec, allow_pickle=allow_pickle)
    check_prompt(stages, arguments)
    encoded = None
    if stages.first and arguments is not None:
        encoded = _encode_prompt(folder, stages, target, arguments, allow_pickle=allow_pickle, say=say)
        release_memory()
    modules: dict[str, Any] = dict.fromkeys(stages.first)
    modules |= load_components(folder, stages, stages.rest, target, allow_pickle=allow_pickle, say=say)
    pipe = assemble_pipeline(folder, modules)
    devices = {name: target if stages.loads[name].direct else "cpu" for name in stages.rest}
    _, placed = freed_first(stages.placed)
    applied = finish_applying(
        pipe,
        plan,
        target,
        placed=placed,
        decodes=stages.decodes,
        remaining=stages.deferred,
        devices=devices,
    )
    given = encoded.arguments if encoded else arguments(pipe) if arguments else {}
    return LoadedPipeline(applied=applied, arguments=given, encoded=encoded)


def _encode_prompt(
    folder: Path,
    stages: LoadStages,
    device: str,
    arguments: Callable[[Any], Mapping[str, Any]],
    *,
    allow_pickle: bool,
    say: Say,
) -> Encoded:
    """Encode the prompt of the call, with only the encoders loaded."""
    modules = weightless_modules(folder, stages.spec, stages.rest)
    modules |= load_components(folder, stages, stages.first, device, allow_pickle=allow_pickle, say=say)
    pipe = assemble_pipeline(folder, modules)
    pipe.set_progress_bar_config(disable=True)
    say(f"encoding the prompt on {device}")
    return encode(pipe, arguments(pipe), stages.first)
