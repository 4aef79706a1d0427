"""Progress bars, shown in a notebook or on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Seconds before a bar appears: shorter work ends before it can be read. Assumed.
_DELAY = 2.0

# Loggers that print while their library is imported, and that no environment variable silences.
CHATTY_LOGGERS = ("torchao", "bitsandbytes", "torch.utils._pytree")

Say = Callable[[str], None]


def can_show_progress() -> bool:
    """Whether a progress bar would be seen: in a notebook, or with standard error on a terminal."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython and ipython.get_ipython(), "kernel") or sys.stderr.isatty()


def hide_bars() -> None:
    """Hide all progress bars, those of diffusers and transformers included."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def byte_progress(what: str, total_bytes: int) -> Iterator[Callable[[int], object]]:
    """Yield a function that advances a bar by a number of bytes; the bar appears after some seconds.

    No bar is shown where it would not be seen, or while diffusers' bars are off (`disable_progress_bar`).
    """
    if not total_bytes or not _bars_enabled():
        yield lambda done_bytes: None
        return
    from tqdm.auto import tqdm

    binary = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with tqdm(desc=what, total=total_bytes, delay=_DELAY, mininterval=0, miniters=1, leave=False, **binary) as bar:
        yield bar.update


@contextmanager
def step_progress(what: str) -> Iterator[Callable[[str], object]]:
    """Yield a function to call with the name of each step as it begins; the line appears after some seconds."""
    if not _bars_enabled():
        yield lambda text: None
        return
    from tqdm.auto import tqdm

    with tqdm(desc=what, delay=_DELAY, leave=False, bar_format="{desc}: {postfix} ({n}, {elapsed})") as bar:

        def begin(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        yield begin


def say_above_bars(say: Say) -> Say:
    """Return `say`, printing on a line of its own while a bar is shown."""
    if not _bars_enabled():
        return say
    from tqdm.auto import tqdm

    def say_above(text: str) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            say(text)

    return say_above


def _bars_enabled() -> bool:
    from diffusers.utils.logging import is_progress_bar_enabled

    return can_show_progress() and is_progress_bar_enabled()
