"""Write the pictures or videos that a pipeline returned."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vramplan.errors import UsageError, VramplanError
from vramplan.planfile.types import Plan

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_VIDEOS = (".mp4", ".gif")


def check_output(path: str, plan: Plan) -> None:
    """Raise UsageError if the result could not be written, before anything is loaded."""
    target = Path(path)
    allowed = _VIDEOS if plan.workload.num_frames > 1 else _PICTURES
    if target.suffix.lower() not in allowed:
        raise UsageError(f"`output` {path}: the name must end in {', '.join(allowed)}")
    if not target.parent.is_dir():
        raise UsageError(f"`output` {path}: its folder does not exist")


def write_result(result: Any, path: Path) -> list[Path]:
    """Write every picture or video, each whole or not at all, numbered if several. Return the files written."""
    results = result.frames if hasattr(result, "frames") else result.images
    targets = [path.with_stem(f"{path.stem}-{place}") for place in range(len(results))] if len(results) > 1 else [path]
    for target, item in zip(targets, results, strict=True):
        _write_atomically(target, partial(_write_one, item))
    return targets


def _write_one(item: Any, path: Path) -> None:
    """Write a picture, a video, or a video's only frame as a picture."""
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


def _write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
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
