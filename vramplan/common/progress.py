"""A bar for what takes long, where somebody is there to see it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Less than this is over before a bar can be read. Assumed.
_SECONDS = 2.0

# Loggers of libraries that talk while they are imported, and are told by no variable not to.
TALKING = ("torchao", "bitsandbytes", "torch.utils._pytree")

Say = Callable[[str], None]


def progress_shown() -> bool:
    """Whether somebody is there to see a progress bar: in a notebook, or where standard error is a terminal."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython and ipython.get_ipython(), "kernel") or sys.stderr.isatty()


def hide_bars() -> None:
    """No bar is shown from now on, of the libraries' own neither."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def moved_bytes(what: str, total_bytes: int) -> Iterator[Callable[[int], object]]:
    """Yields what is to be told of bytes that are done: it moves a bar, once all takes some seconds.

    There is none where nobody sees it, or where the bars of diffusers are off (`disable_progress_bar`).
    """
    if not total_bytes or not _shown():
        yield lambda done_bytes: None
        return
    from tqdm.auto import tqdm

    binary = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with tqdm(desc=what, total=total_bytes, delay=_SECONDS, mininterval=0, miniters=1, leave=False, **binary) as bar:
        yield bar.update


@contextmanager
def steps_shown(what: str) -> Iterator[Callable[[str], object]]:
    """Yields what is to be told of each thing that begins: it is named in one line, once all takes some seconds."""
    if not _shown():
        yield lambda text: None
        return
    from tqdm.auto import tqdm

    with tqdm(desc=what, delay=_SECONDS, leave=False, bar_format="{desc}: {postfix} ({n}, {elapsed})") as bar:

        def told(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        yield told


def beside_bars(say: Say) -> Say:
    """The same words on a line of their own while a bar is shown."""
    if not _shown():
        return say
    from tqdm.auto import tqdm

    def told(text: str) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            say(text)

    return told


def _shown() -> bool:
    from diffusers.utils.logging import is_progress_bar_enabled

    return progress_shown() and is_progress_bar_enabled()
