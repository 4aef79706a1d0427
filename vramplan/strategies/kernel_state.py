"""The state that settings of attention and compiling change on a module, saved before and restored after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class KernelState:
    """A module's compiled call, its attention processor, and the backend of that; each may be None."""

    compiled: Any
    processor: Any
    backend: Any

    @classmethod
    def of(cls, module: torch.nn.Module) -> KernelState:
        """Read the state of the module itself, without its submodules."""
        processor = getattr(module, "processor", None)
        return cls(module._compiled_call_impl, processor, getattr(processor, "_attention_backend", None))

    def restore(self, module: torch.nn.Module) -> None:
        """Restore the objects that changed; a processor with weights, such as an IP-Adapter's, is kept."""
        if module._compiled_call_impl is not self.compiled:
            module._compiled_call_impl = self.compiled
        added = "processor" in module._modules
        if self.processor is not None and not added and getattr(module, "processor", None) is not self.processor:
            module.processor = self.processor
        if hasattr(self.processor, "_attention_backend"):
            self.processor._attention_backend = self.backend
