"""What `vramplan apply` does around applying: load, generate, write the result, compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.common.progress import Say, progress_shown
from vramplan.errors import UsageError
from vramplan.planfile.types import Plan
from vramplan.runtime.call import call_arguments
from vramplan.runtime.output import write_result

if TYPE_CHECKING:
    from vramplan.calibration.measured import Measured


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

    With `recover` a call that runs out of memory is made again under a smaller plan. `bars` show progress to whoever
    is there to see it.

    Raises:
        VramplanError: the pipeline cannot be loaded or the result not written.
        MismatchError: the plan is for another pipeline or device.
    """
    from vramplan.api.recover import recovering_call
    from vramplan.calibration.measured import current_rss_bytes
    from vramplan.runtime.applied import applied_to
    from vramplan.runtime.recording import calibrating
    from vramplan.runtime.staged import load_applied

    folder = model_folder(plan, model)
    say(f"loading {folder}")
    before = current_rss_bytes()
    shown = bars and progress_shown()
    if not shown:
        _without_bars()

    def arguments(pipe: Any) -> dict[str, Any]:
        return call_arguments(pipe, plan, prompt or "", negative_prompt, seed)

    loaded = load_applied(plan, folder, None if prompt is None else arguments, allow_pickle=allow_pickle, say=say)
    applied, pipe = loaded.applied, loaded.applied.pipe
    pipe.set_progress_bar_config(disable=not shown)
    if prompt is None:
        return RunResult(plan=applied.plan, calls=applied.calls, notes=applied.notes)
    say(f"generating on {applied.device}")
    with calibrating(pipe, ram_before_bytes=before, say=say) as took, loaded.watched():
        result = recovering_call(pipe, loaded.arguments, say=say) if recover else pipe(**loaded.arguments)
    written = write_result(result, Path(output)) if output else []
    last = applied_to(pipe) or applied
    return RunResult(plan=last.plan, calls=last.calls, notes=last.notes, written=tuple(written), took=took)


def _without_bars() -> None:
    """No progress bars, of the libraries' own neither."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def model_folder(plan: Plan, given: str | None) -> Path:
    """The folder to load from: the one given, else the one planned for, or its snapshot in the hub's cache.

    Raises:
        UsageError: a plan made from a profile or a live pipeline has no folder of its own.
        VramplanError: the repository planned for is not on this machine; the message says how to download it.
    """
    from vramplan.pipeline.hub import PREFIX
    from vramplan.runtime.download import downloaded

    if given is None and (plan.model.source == "live" or plan.model.source.startswith("profile:")):
        raise UsageError(f"the plan was made from {plan.model.source}: give --model FOLDER, where the weights are")
    if given is None and plan.model.source.startswith(PREFIX):
        return downloaded(plan)
    return Path(given or plan.model.source)
