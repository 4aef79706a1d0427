"""Run a plan, for `vramplan apply`: load, apply, generate, write the result, measure."""

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
    """The result of `vramplan apply`: the plan applied at the end, its diffusers calls, and notes on differences from
    the plan; the files written; and the measured call, None if no call was made."""

    plan: Plan
    calls: Sequence[str]
    notes: Sequence[str]
    written: Sequence[Path] = ()
    measured: Measured | None = None


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
    """Load the pipeline, apply the plan, and generate if there is a prompt; return the result with its measured call.

    `described` is the description of the folder to load from, if the caller has one. With `recover` a call that runs
    out of memory is retried under a smaller plan. `bars` shows progress in a terminal or a notebook.

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
    ram_before = current_rss_bytes()
    show_bars = bars and can_show_progress()
    if not show_bars:
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
    pipe.set_progress_bar_config(disable=not show_bars)
    if prompt is None:
        notes = (*applied.notes, "nothing generated: give `prompt` to generate and measure")
        return RunResult(plan=applied.plan, calls=applied.calls, notes=notes)
    say(f"generating on {applied.device}")
    with calibrating(pipe, ram_before_bytes=ram_before, say=say) as measured, loaded.checking_encodings():
        result = recovering_call(pipe, loaded.arguments, say=say) if recover else pipe(**loaded.arguments)
    written = write_result(result, Path(output)) if output else []
    last = applied_to(pipe) or applied
    return RunResult(plan=last.plan, calls=last.calls, notes=last.notes, written=tuple(written), measured=measured)


def model_folder(plan: Plan, given: str | None) -> Path:
    """Return the folder to load from: the one given, else the planned one, or its snapshot in the hub's cache.

    Raises:
        UsageError: the plan was made from a profile or a live pipeline, which has no folder.
        VramplanError: the repository planned for is not on this machine; the message says how to download it.
    """
    from vramplan.runtime.download import downloaded_snapshot

    source = plan.model.origin
    if given is not None:
        return Path(given)
    if isinstance(source, Hub):
        return downloaded_snapshot(plan, source)
    if isinstance(source, Folder):
        return source.path
    raise UsageError(f"the plan was made from {source}: give `model=FOLDER`, where the weights are")
