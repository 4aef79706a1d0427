"""Build a component without its weights: the real class, from its configuration, on the meta device."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vramplan.errors import VramplanError

if TYPE_CHECKING:
    import torch

# Libraries whose classes a model_index.json may name; any other class would be unknown code.
LIBRARIES = ("diffusers", "transformers")


def component_class(library: str, class_name: str) -> Any:
    """The class named by a `model_index.json` entry.

    `library` is `diffusers`, `transformers`, or the name of one of diffusers' own pipeline modules
    (`stable_diffusion`, for its safety checker).

    Raises:
        VramplanError: not a class of these libraries as installed; importing any other would run unknown code.
    """
    for module_name in (library, f"diffusers.pipelines.{library}"):
        if module_name.split(".")[0] not in LIBRARIES:
            continue
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        found = getattr(module, class_name, None)
        if isinstance(found, type):
            return found
    raise VramplanError(f"{library}.{class_name} is not a class of diffusers or transformers installed here")


def has_weights(cls: type) -> bool:
    """Whether components of the class are modules, not tokenizers, schedulers or processors."""
    import torch

    return issubclass(cls, torch.nn.Module)


def weightless_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module, live or weightless, on the meta device. Tied tensors stay tied.

    Quantized layers become stand-ins.
    """
    import copy

    import torch

    from vramplan.pipeline.packed_linear import stand_in
    from vramplan.pipeline.quantization import kind_of

    memo: dict[int, Any] = {id(layer): made for layer in module.modules() if (made := stand_in(layer)) is not None}
    for tensor in (*module.parameters(), *module.buffers()):
        if kind_of(tensor):
            continue
        bare = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = torch.nn.Parameter(bare, False) if isinstance(tensor, torch.nn.Parameter) else bare
    return copy.deepcopy(module, memo)


def build_weightless(library: str, class_name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """The component with every parameter and buffer on the meta device, in evaluation mode.

    `config` is the content of `config.json` or a part of it; missing keys take the class defaults.
    Weights that the class ties are one tensor, as after `from_pretrained`.
    """
    import torch

    cls = component_class(library, class_name)
    with torch.device("meta"):
        if hasattr(cls, "config_class") and cls.config_class is not None:
            module = cls(cls.config_class.from_dict(dict(config)))
            module.tie_weights()
        else:
            module = cls.from_config(dict(config))
    module.to("meta")  # skip_init, which ChatGLM uses, leaves uninitialised weights on the CPU
    module.eval()
    return module  # type: ignore[no-any-return]
