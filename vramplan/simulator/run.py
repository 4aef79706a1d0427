"""Run a whole pipeline call on the simulated device and read its memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from vramplan.simulator.engine import Engine
from vramplan.simulator.ledger import Ledger
from vramplan.simulator.mode import SimulatedDevices
from vramplan.simulator.patches import patched_runtime


@contextmanager
def simulated_devices(engine: Engine) -> Iterator[None]:
    """Everything in place for simulated tensors; nothing of it is left when the block ends."""
    with patched_runtime(engine), SimulatedDevices(engine), torch.no_grad():
        yield


@contextmanager
def followed(pipe: Any, ledger: Ledger) -> Iterator[None]:
    """Keep the ledger told which phase, component and module is running."""
    names = {id(module): f"{part}.{name}" if name else part for part, root in _modules(pipe).items() for name, module in root.named_modules()}
    roles = _phases(pipe)
    stack: list[tuple[str, str]] = []

    def enter(module: torch.nn.Module, *_: Any) -> None:
        name = names.get(id(module))
        if name is None:
            return
        stack.append((ledger.component, ledger.phase))
        ledger.modules.append(name)
        part = name.partition(".")[0]
        ledger.component = part
        ledger.phase = roles(part)

    def leave(module: torch.nn.Module, *_: Any) -> None:
        if id(module) in names and stack:
            ledger.modules.pop()
            ledger.component, ledger.phase = stack.pop()

    from torch.nn.modules import module as nn_module

    before = nn_module.register_module_forward_pre_hook(enter)
    after = nn_module.register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _modules(pipe: Any) -> Mapping[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def _phases(pipe: Any) -> Callable[[str], str]:
    from vramplan.pipeline.component import role_of

    roles = {
        name: role_of(name, type(module).__module__.split(".")[0], type(module).__name__)
        for name, module in _modules(pipe).items()
    }
    seen = {"denoise": False}

    def phase(name: str) -> str:
        if roles[name] in ("denoiser", "control"):
            seen["denoise"] = True
            return "denoise"
        return "decode" if seen["denoise"] else "encode"

    return phase
