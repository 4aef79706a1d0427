"""What `vramplan apply` does around applying: load, generate, write the result, compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.common.progress import Say, can_show_progress, hide_bars
from vramplan.errors import UsageError
from vramplan.pipeline.describe import Model
from vramplan.pipeline.sources import Folder, Hub
from vramplan.planfile.types import Plan
from vramplan.runtime.call import call_arguments
from vramplan.runtime.output import write_result

if TYPE_CHECKING:
    from vramplan.calibration.peaks import Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What `vramplan apply` did: the plan that was on at the end, its diffusers calls, and notes where it had to be
    done otherwise; the files written; and what the call took, None where none was made."""

    plan: Plan
    calls: Sequence[str]
    notes: Sequence[str]
    written: Sequence[Path] = ()
    took: Measured | None = None


def run_plan(
    plan: Plan,
    *,
    model: str | None = None,
    described: Model | None = None,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    output: str | None = None,
    allow_pickle: bool = False,
    recover: bool = True,
    bars: bool = True,
    say: Say = print,
) -> RunResult:
    """Load, apply, generate when there is a prompt; what was done and what it took.

    `described` is the folder to load from, where the caller has described it. With `recover` a call that runs out of
    memory is made again under a smaller plan. `bars` shows progress in a terminal or a notebook.

    Raises:
        VramplanError: the pipeline cannot be loaded or the result not written.
        MismatchError: the plan is for another pipeline or device.
    """
    from vramplan.api.recover import recovering_call
    from vramplan.calibration.peaks import current_rss_bytes
    from vramplan.runtime.applied import applied_to
    from vramplan.runtime.recording import calibrating
    from vramplan.runtime.staged import load_applied

    folder = model_folder(plan, model)
    say(f"loading {folder}")
    before = current_rss_bytes()
    shown = bars and can_show_progress()
    if not shown:
        hide_bars()

    def arguments(pipe: Any) -> dict[str, Any]:
        return call_arguments(pipe, plan, prompt or "", negative_prompt, seed)

    loaded = load_applied(
        plan,
        folder,
        None if prompt is None else arguments,
        spec=described.spec if described else None,
        allow_pickle=allow_pickle,
        say=say,
    )
    applied, pipe = loaded.applied, loaded.applied.pipe
    pipe.set_progress_bar_config(disable=not shown)
    if prompt is None:
        notes = (*applied.notes, "nothing generated: give `prompt` to generate and measure")
        return RunResult(plan=applied.plan, calls=applied.calls, notes=notes)
    say(f"generating on {applied.device}")
    with calibrating(pipe, ram_before_bytes=before, say=say) as took, loaded.watched():
        result = recovering_call(pipe, loaded.arguments, say=say) if recover else pipe(**loaded.arguments)
    written = write_result(result, Path(output)) if output else []
    last = applied_to(pipe) or applied
    return RunResult(plan=last.plan, calls=last.calls, notes=last.notes, written=tuple(written), took=took)


def model_folder(plan: Plan, given: str | None) -> Path:
    """The folder to load from: the one given, else the one planned for, or its snapshot in the hub's cache.

    Raises:
        UsageError: a plan made from a profile or a live pipeline has no folder of its own.
        VramplanError: the repository planned for is not on this machine; the message says how to download it.
    """
    from vramplan.runtime.download import downloaded

    source = plan.model.origin
    if given is not None:
        return Path(given)
    if isinstance(source, Hub):
        return downloaded(plan, source)
    if isinstance(source, Folder):
        return source.path
    raise UsageError(f"the plan was made from {source}: give `model=FOLDER`, where the weights are")
