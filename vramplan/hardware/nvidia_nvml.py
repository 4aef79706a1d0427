"""Answers of NVML, NVIDIA's management library: None for whatever it does not tell. No CUDA context is made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


def import_nvml() -> Any:
    """The module pynvml. Raises ImportError where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the retired package of the same module name warns when imported
        import pynvml
    return pynvml


@contextmanager
def opened(nvml: Any) -> Iterator[None]:
    """NVML, started and in any case stopped. Raises NVMLError where it cannot be started."""
    nvml.nvmlInit()
    try:
        yield
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def ask(nvml: Any, question: str, *arguments: Any) -> Any:
    """NVML's answer, None where it has none: no single fact is worth losing the card for.

    Older releases of the module lack functions, older drivers lack what the module calls.
    """
    function: Callable[..., Any] | None = getattr(nvml, question, None)
    if function is None:
        return None
    try:
        return function(*arguments)
    except (nvml.NVMLError, AttributeError, TypeError, ValueError, UnicodeError):
        return None


def text(value: Any) -> str | None:
    """Text from bytes, which the oldest releases of the module give."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return value if isinstance(value, str) and value else None


def whole(value: Any, *, most: int) -> int | None:
    """The number where it is one and makes sense: from 0 to `most`."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most else None
