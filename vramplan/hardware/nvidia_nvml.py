"""Calls to NVML, NVIDIA's management library, None where it has no answer. They make no CUDA context."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


def import_nvml() -> Any:
    """Import pynvml without its warnings. Raises ImportError if it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the retired package of the same module name warns when imported
        import pynvml
    return pynvml


@contextmanager
def nvml_session(nvml: Any) -> Iterator[None]:
    """Start NVML for the block, and stop it in any case. Raises NVMLError if it cannot be started."""
    nvml.nvmlInit()
    try:
        yield
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def ask(nvml: Any, question: str, *arguments: Any) -> Any:
    """Call an NVML function; None on any error, as one missing fact must not hide the card.

    Older releases of pynvml lack functions, older drivers lack functions that pynvml calls.
    """
    function: Callable[..., Any] | None = getattr(nvml, question, None)
    if function is None:
        return None
    try:
        return function(*arguments)
    except (nvml.NVMLError, AttributeError, TypeError, ValueError, UnicodeError):
        return None


def to_text(value: Any) -> str | None:
    """The value as text, decoded from the bytes of the oldest pynvml releases; None if empty or neither."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return value if isinstance(value, str) and value else None


def whole_number(value: Any, *, most: int) -> int | None:
    """The value if it is an int from 0 to `most`, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most else None
