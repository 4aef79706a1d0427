"""List the modules of a live pipeline, and the pipelines that it combines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def modules_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """The pipeline's modules by component name, in its own order."""
    import torch

    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def pipes_of(pipe: Any) -> list[Any]:
    """The pipeline, and those that a combined one consists of, which hook the same modules in their own calls."""
    from diffusers import DiffusionPipeline

    return [pipe, *(part for part in vars(pipe).values() if isinstance(part, DiffusionPipeline))]
