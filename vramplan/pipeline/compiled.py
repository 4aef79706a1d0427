"""Read what is compiled of a module by torch, and whether its weights can be streamed then."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vramplan.pipeline.geometry import units_of

if TYPE_CHECKING:
    import torch

# The attribute of a module whose calls are compiled (torch 2.13, `Module.compile`).
COMPILED = "_compiled_call_impl"


def streaming_refusal(module: torch.nn.Module) -> str | None:
    """Why the module's weights cannot be streamed as it is compiled, None if they can.

    Those of compiled blocks can: what brings them runs before the compiled call. What is compiled around blocks would
    take hooks and copies into its graph; CUDA graphs read weights at the addresses that they had at the capture.
    """
    if type(module).__name__ == "OptimizedModule" or compiled_call(module) or _is_compiled(vars(module).get("forward")):
        return (
            f"{_name(module)} is compiled as a whole, with all that would copy its weights: compile its repeated "
            "blocks instead (compile_repeated_blocks)"
        )
    units = {id(unit) for unit in units_of(module)}
    for child, call in _calls(module):
        refusal = _call_refusal(child, call, units)
        if refusal:
            return refusal
    return None


def compiled_call(module: torch.nn.Module) -> Any:
    """What torch compiled of a module in place (`Module.compile`), None without it."""
    return vars(module).get(COMPILED)


def _calls(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Any]]:
    """The compiled submodules, each with the object that knows how it was compiled."""
    for child in module.modules():
        call = child if type(child).__name__ == "OptimizedModule" else compiled_call(child)
        if call is not None:
            yield child, call
        forward = vars(child).get("forward")
        if _is_compiled(forward):
            yield child, forward


def _call_refusal(child: torch.nn.Module, call: Any, units: Collection[int]) -> str | None:
    settings = _settings(call)
    if settings.get("triton.cudagraphs") or _backend(call) == "cudagraphs":
        return (
            f"{_name(child)} is compiled with CUDA graphs, which read weights at fixed addresses: compile it in "
            "another mode (max-autotune-no-cudagraphs)"
        )
    if settings.get("freezing"):
        return f"{_name(child)} is compiled with frozen weights, of which it keeps copies"
    inner = next((each for each in child.modules() if each is not child and id(each) in units), None)
    if inner is not None and getattr(child, "_orig_mod", None) is not inner:
        return f"{_name(child)} is compiled as a whole, and holds several blocks that would be streamed"
    return None


def _settings(call: Any) -> Mapping[str, Any]:
    """The settings of Inductor for a compiled call, those that the process has now included; empty for other
    backends."""
    with suppress(Exception):  # private to torch, and nothing that a forward needs
        own = getattr(call, "compiled", call).get_compiler_config()
        if own is not None:
            from torch._inductor import config

            general = {"triton.cudagraphs": config.triton.cudagraphs, "freezing": config.freezing}
            return {name: bool(own.get(name)) or value for name, value in general.items()}
    return {}


def _backend(call: Any) -> str:
    """The name of the backend that compiled it; empty where torch does not say."""
    with suppress(Exception):
        from torch._dynamo.eval_frame import OptimizeContext, innermost_backend

        known = getattr(call, "compiled", call)
        cells = [cell.cell_contents for cell in getattr(known, "__closure__", None) or ()]
        context = next((each for each in cells if isinstance(each, OptimizeContext)), None)
        context = context or known.dynamo_ctx
        callback: Any = context.callback
        return str(getattr(innermost_backend(callback), "compiler_name", ""))
    return ""


def _is_compiled(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")


def _name(module: torch.nn.Module) -> str:
    return type(getattr(module, "_orig_mod", module)).__name__
