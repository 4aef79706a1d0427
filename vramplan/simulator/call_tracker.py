"""Track the phase, component and module that run, and keep them in the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.modules import module as nn_module

from vramplan.pipeline.component import role_of
from vramplan.pipeline.modules import modules_of
from vramplan.pipeline.types import PhaseName, Role
from vramplan.simulator.ledger import Ledger
from vramplan.simulator.types import DecodedLatents

# Pipelines call these methods of a VAE, not its forward.
_VAE_METHODS = ("encode", "decode")


@contextmanager
def track_call(pipe: Any, ledger: Ledger) -> Iterator[list[DecodedLatents]]:
    """Context manager: operations count towards the component and module that run. Yields the decoded latents so far.

    The pipeline's own code between its components counts towards the phase of the last component: latents and
    schedulers towards denoising once that has begun, postprocessing towards the decode.
    """
    tracker = _CallTracker(pipe, ledger)
    ledger.phase = tracker.phase("")
    before = nn_module.register_module_forward_pre_hook(tracker.enter)
    after = nn_module.register_module_forward_hook(tracker.leave, always_call=True)
    try:
        with ExitStack() as stack:
            for name, module in modules_of(pipe).items():
                stack.enter_context(tracker.wrap_methods(name, module))
            yield tracker.decoded
    finally:
        before.remove()
        after.remove()


def named_modules(pipe: Any) -> dict[str, torch.nn.Module]:
    """Every module of the pipeline once, by its first qualified name, which starts with the component's."""
    found: dict[int, tuple[str, torch.nn.Module]] = {}
    for part, root in modules_of(pipe).items():
        for name, module in root.named_modules():
            found.setdefault(id(module), (f"{part}.{name}" if name else part, module))
    return dict(found.values())


class _CallTracker:
    def __init__(self, pipe: Any, ledger: Ledger) -> None:
        self.ledger = ledger
        self.roles: dict[str, Role] = {}
        self.began_denoising = False
        self._denoises = False
        self.components: list[str] = []
        self.decoded: list[DecodedLatents] = []
        for part, root in modules_of(pipe).items():
            library = type(root).__module__.split(".")[0]
            self.roles[part] = role_of(part, library, type(root).__name__)
            self._denoises |= self.roles[part] in ("denoiser", "control")
        self.names = {id(module): name for name, module in named_modules(pipe).items()}

    def enter(self, module: torch.nn.Module, *_: Any) -> None:
        name = self.names.get(id(module))
        if name is not None:
            self.push(name)

    def leave(self, module: torch.nn.Module, *_: Any) -> None:
        if id(module) in self.names and self.components:
            self.pop()

    def push(self, name: str) -> None:
        ledger, part = self.ledger, name.partition(".")[0]
        self.components.append(ledger.component)
        ledger.modules.append(name)
        entered = ledger.component != part
        ledger.component = part
        ledger.phase = self.phase(part)
        ledger.cost.forwards += entered

    def pop(self) -> None:
        self.ledger.modules.pop()
        self.ledger.component = self.components.pop()

    def phase(self, part: str) -> PhaseName:
        if self.roles.get(part) in ("denoiser", "control"):
            self.began_denoising = True
            return "denoise"
        return "decode" if self.began_denoising or not self._denoises else "encode"

    @contextmanager
    def wrap_methods(self, name: str, module: torch.nn.Module) -> Iterator[None]:
        """Context manager: wrap a VAE's encode and decode on the instance."""
        wrapped = [method for method in _VAE_METHODS if self.roles[name] == "vae" and hasattr(module, method)]
        for method in wrapped:
            module.__dict__[method] = self._wrap(name, method, getattr(module, method))
        try:
            yield
        finally:
            for method in wrapped:
                module.__dict__.pop(method, None)

    def _wrap(self, name: str, method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.push(name)
            if method == "decode" and args:
                self.decoded.append(
                    DecodedLatents(
                        component=name,
                        shape=tuple(args[0].shape),
                        stride=args[0].stride(),
                        dtype=str(args[0].dtype).removeprefix("torch."),
                        frames=kwargs.get("num_frames"),
                    )
                )
            try:
                return original(*args, **kwargs)
            finally:
                self.pop()

        return call
