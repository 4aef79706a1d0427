"""Versions of the libraries that a pipeline's memory use depends on."""

from __future__ import annotations

from functools import cache

SOFTWARE = ("torch", "diffusers", "transformers", "accelerate")


@cache
def versions() -> dict[str, str]:
    """The installed version of each library in `SOFTWARE`; a missing library has no entry."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
