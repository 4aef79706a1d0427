"""What `vramplan apply` does around applying: load, generate, write the result, compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.errors import UsageError, VramplanError
from vramplan.planfile import Plan
from vramplan.progress import progress_shown
from vramplan.units import format_bytes

if TYPE_CHECKING:
    from vramplan.encode import Encoded
    from vramplan.strategies.base import Placed
    from vramplan.verify import Measured

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_VIDEOS = (".mp4", ".gif")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
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
    say: Callable[[str], None] = print,
) -> Ran:
    """Load, apply, generate when there is a prompt; what was done and what it took.

    With `recover` a call that runs out of memory is made again under a smaller plan. `bars` show progress to whoever
    is there to see it.

    Raises:
        VramplanError: the pipeline cannot be loaded or the result not written.
        MismatchError: the plan is for another pipeline or device.
    """
    from vramplan.apply import applied_to
    from vramplan.calibration.recording import calibrating
    from vramplan.recover import recovering_call
    from vramplan.staged import load_applied
    from vramplan.verify import current_rss_bytes

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
        return Ran(plan=applied.plan, calls=applied.calls, notes=applied.notes)
    say(f"generating on {applied.device}")
    with calibrating(pipe, ram_before_bytes=before, say=say) as took, loaded.watched():
        result = recovering_call(pipe, loaded.arguments, say=say) if recover else pipe(**loaded.arguments)
    written = write_result(result, Path(output)) if output else []
    last = applied_to(pipe) or applied
    return Ran(plan=last.plan, calls=last.calls, notes=last.notes, written=tuple(written), took=took)


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
    from vramplan.snapshot_folder import downloaded

    if given is None and (plan.model.source == "live" or plan.model.source.startswith("profile:")):
        raise UsageError(f"the plan was made from {plan.model.source}: give --model FOLDER, where the weights are")
    if given is None and plan.model.source.startswith(PREFIX):
        return downloaded(plan)
    return Path(given or plan.model.source)


def call_arguments(
    pipe: Any, plan: Plan, prompt: str, negative_prompt: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """The arguments of a call that is the plan's workload, as far as this pipeline's call takes them."""
    import inspect

    import torch

    work = plan.workload
    takes = inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters
    wanted = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "height": work.height,
        "width": work.width,
        "num_frames": work.num_frames,
        "num_images_per_prompt": work.num_images_per_prompt,
        "num_videos_per_prompt": work.num_images_per_prompt,
        "num_inference_steps": work.num_inference_steps,
        "guidance_scale": work.guidance_scale,
        "generator": torch.Generator("cpu").manual_seed(seed),
    }
    return {name: value for name, value in wanted.items() if value is not None and name in takes}


def check_output(path: str, plan: Plan) -> None:
    """Raises UsageError where the result could not be written, before anything is loaded."""
    target = Path(path)
    allowed = _VIDEOS if plan.workload.num_frames > 1 else _PICTURES
    if target.suffix.lower() not in allowed:
        raise UsageError(f"--output {path}: the name must end in {', '.join(allowed)}")
    if not target.parent.is_dir():
        raise UsageError(f"--output {path}: its folder does not exist")


def write_result(result: Any, path: Path) -> list[Path]:
    """Write every picture or video, each whole or not at all; several get a number each. The files written."""
    results = result.frames if hasattr(result, "frames") else result.images
    targets = [path.with_stem(f"{path.stem}-{place}") for place in range(len(results))] if len(results) > 1 else [path]
    for target, item in zip(targets, results, strict=True):
        _whole(target, partial(_write_one, item))
    return targets


def _write_one(item: Any, path: Path) -> None:
    """A picture, a video, or the one frame of a video as a picture."""
    if path.suffix.lower() in _VIDEOS:
        _write_video(item, path)
    else:
        (item[0] if isinstance(item, list) else item).save(path)


def _write_video(frames: Any, path: Path) -> None:
    if path.suffix.lower() == ".gif":
        from diffusers.utils import export_to_gif

        export_to_gif(frames, str(path))
        return
    from diffusers.utils import export_to_video

    export_to_video(frames, str(path), fps=8)


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_stem(f".{path.stem}.part")
    try:
        write(temporary)
        temporary.replace(path)
    except ImportError as error:
        raise VramplanError(f"{path}: writing it needs another package: {error}") from error
    except OSError as error:
        raise VramplanError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def plan_code(plan: Plan) -> str:
    """The plan as a script of plain diffusers calls, its loading included.

    Raises:
        UsageError: the plan was made from a live pipeline; the calls are then on the applied plan's `calls`.
        VramplanError: a name in the plan cannot stand in code.
    """
    from vramplan.planned import parse_settings
    from vramplan.script import Script

    _check_words(plan)
    placed, decodes = parse_settings(plan, None, plan.machine.accelerator)
    budget = plan.machine.budget
    limit = "" if budget.vram_bytes is None else f" within {format_bytes(budget.vram_bytes)}"
    source, vaes = _origin(plan)
    encoded = _hollow_encoded(plan, placed)
    script = Script(plan=plan, source=source, placed=placed, decodes=decodes, vaes=vaes, encoded=encoded)
    return "\n".join([f"# {plan.model.class_name}{limit}: {' '.join(plan.reason.split())}", *script.lines()])


def _hollow_encoded(plan: Plan, placed: Placed) -> Encoded | None:
    """What encoding the prompt is given and gives in this plan, read off a pipeline without weights."""
    from vramplan.models import describe
    from vramplan.planfile import load_options
    from vramplan.script import PROMPT
    from vramplan.simulator.run import run_encode
    from vramplan.simulator.source import Source
    from vramplan.strategies.base import freed_first

    first = [name for _, names in freed_first(placed)[0] for name in names]
    if not first:
        return None
    model = plan.model.source.removeprefix("profile:")
    spec = describe(model, **load_options(plan)).spec
    return run_encode(Source(model, spec).parts, lambda pipe: call_arguments(pipe, plan, PROMPT), first)


def _origin(plan: Plan) -> tuple[str, dict[str, Any]]:
    """Where to load the pipeline from, and its VAEs without weights, whose tile attributes the code names.

    Raises:
        UsageError: the plan was made from a live pipeline; the calls are then on the applied plan's `calls`.
    """
    from vramplan.pipeline.build import build_weightless
    from vramplan.pipeline.folder import read_config, read_index
    from vramplan.pipeline.hub import open_source
    from vramplan.planned import vae_names
    from vramplan.profiles import load_pipeline_profile

    source = plan.model.source
    names = vae_names(plan) if plan.settings.decode else []
    if source == "live":
        raise UsageError("the plan was made from a live pipeline: its calls are on vramplan.apply_plan(...).calls")
    if source.startswith("profile:"):
        profile = load_pipeline_profile(source.removeprefix("profile:"))
        parts = {name: profile.components[name] for name in names}
        return profile.repos[0], {
            name: build_weightless(part.library, part.class_name, part.config) for name, part in parts.items()
        }
    if not names:
        return source, {}
    repository = open_source(source)
    index = read_index(repository)
    return source, {
        name: build_weightless(index[name][0], index[name][1], read_config(repository, name)) for name in names
    }


def _check_words(plan: Plan) -> None:
    """Raises VramplanError where a name of the plan would become other code than a name."""
    words = [
        plan.model.class_name,
        *plan.settings.placement,
        *(word for record in plan.model.components for word in (record.class_name, record.library)),
        *plan.settings.weights,
        *plan.settings.attention,
        *plan.settings.compile,
        plan.machine.device.replace(":", "_"),
    ]
    words += [word for record in plan.model.components for word in (record.name, record.dtype, record.library)]
    for word in words:
        if not word.isidentifier():
            raise VramplanError(f"the plan names {word!r}, which cannot stand in Python code")
