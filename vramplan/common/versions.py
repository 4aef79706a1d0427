"""The versions of the libraries that a pipeline's memory depends on."""

from __future__ import annotations

from functools import cache

SOFTWARE = ("torch", "diffusers", "transformers", "accelerate")


@cache
def versions() -> dict[str, str]:
    """The versions that are installed of what a projection depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
