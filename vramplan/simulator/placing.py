"""The settings of a simulated pipeline, and those of its device's allocator."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from vramplan.strategies.base import Decodes, Placed, apply_settings

# The name of every simulated device: capacity and kernels make the difference.
DEVICE = "cuda:0"


def settings_applier(placed: Placed, decodes: Decodes) -> Callable[[Any], None]:
    """Return a function that applies the settings to a hollow pipeline."""

    def place(pipe: Any) -> None:
        apply_settings(pipe, placed, decodes, DEVICE, hollow=True)
        if not any(setting.axis == "placement" for setting, _ in placed):
            pipe.to(DEVICE)

    return place


def expandable_segments() -> bool:
    """Whether the environment enables expandable segments of torch's allocator, for the process that runs the plan too.

    Both names are read: PYTORCH_ALLOC_CONF since torch 2.10, PYTORCH_CUDA_ALLOC_CONF before.
    """
    options = ",".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return "expandable_segments:true" in options.replace(" ", "").lower()
