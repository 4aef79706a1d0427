"""Describe one module: its weights, its pieces, and which operations of diffusers 0.42 it allows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vramplan.pipeline.compiled import streaming_refusal
from vramplan.pipeline.direct_access import called_directly, read_directly, reading_methods
from vramplan.pipeline.execution import attention_backend_refusal, attention_slicing_refusal, compile_refusal
from vramplan.pipeline.geometry import block_modules_of, bytes_by_dtype, measure, tensor_bytes, tensors_of
from vramplan.pipeline.quantization import EIGHT_BIT_STAYS, element_count, mark_quantized, quantization_of
from vramplan.pipeline.tiles import tiling_of
from vramplan.pipeline.types import Component, Role

if TYPE_CHECKING:
    import torch

# The attribute of a module whose weights vramplan streams.
STREAMED = "_vramplan_stream"
_VAE_MARKS = ("Autoencoder", "VAE", "VQ", "MoVQ", "Vae")
_CONTROL_MARKS = ("ControlNet", "T2IAdapter", "MultiAdapter")
_DENOISER_MARKS = ("Transformer", "UNet", "DiT", "Prior", "Denoiser")
_VISION_MARKS = ("Vision", "Siglip", "Dinov2", "ImageEncoder", "DPT")


def role_of(name: str, library: str, class_name: str) -> Role:
    """The role of a component, from its name in the pipeline and its class."""
    if name.endswith("text_encoder") or "text_encoder" in name or name in ("bert", "language_model"):
        return "text_encoder"
    if "image_encoder" in name or (library == "transformers" and _contains_any(_VISION_MARKS, class_name)):
        return "other" if name == "safety_checker" else "image_encoder"
    if name in ("controlnet", "adapter") or _contains_any(_CONTROL_MARKS, class_name):
        return "control"
    if name in ("vae", "movq", "vqvae", "vqgan", "audio_vae") or _contains_any(_VAE_MARKS, class_name):
        return "vae"
    if library == "diffusers" and name != "motion_adapter" and _contains_any(_DENOISER_MARKS, class_name):
        return "denoiser"
    return "other"


def describe_component(
    name: str,
    module: torch.nn.Module,
    *,
    library: str | None = None,
    pipeline: type | None = None,
    live: bool = False,
    converted_at_load: bool = False,
) -> Component:
    """Describe a module as a `Component`. It may be live or weightless; only shapes and dtypes are read.

    `pipeline` is the class whose calls use it.
    """
    library = library or type(module).__module__.split(".")[0]
    role = role_of(name, library, type(module).__name__)
    sizes = bytes_by_dtype(module)
    dtype = next((kind for kind in sizes if "float" in kind), next(iter(sizes), "float32"))
    component = Component(
        name=name,
        library=library,
        class_name=type(module).__name__,
        role=role,
        weight_bytes=sum(sizes.values()),
        parameter_count=sum({id(p): element_count(p) for p in module.parameters()}.values()),
        dtype=dtype,
        dtype_bytes=sizes,
        geometry=measure(module),
        config=plain_config(module),
        element_bytes=_compute_element_bytes(role, dtype, module),
        slicing=hasattr(module, "use_slicing"),
        tiling=tiling_of(module),
        group_offload_refusal=_group_refusal(module),
        block_offload_refusal=_block_refusal(role, module) or _direct_call_refusal(pipeline, name, role, module),
        leaf_offload_refusal=_leaf_refusal(module),
        disk_offload_refusal=_disk_refusal(module) or _direct_read_refusal(pipeline, name, module),
        sequential_offload_refusal=_leaf_refusal(module) or _sequential_refusal(module),
        move_refusal=_move_refusal(module),
        streaming_refusal=streaming_refusal(module),
        attention_slicing_refusal=attention_slicing_refusal(role, module),
        attention_backend_refusal=attention_backend_refusal(role, module),
        compile_refusal=compile_refusal(role, module),
        device=device_of(module) if live else None,
        hooks=hooks_of(module) if live else (),
        converted_at_load=converted_at_load,
    )
    return mark_quantized(component, quantization_of(module))


def device_of(module: torch.nn.Module) -> str | None:
    """The device of a module's largest tensor, None where it has no tensors."""
    heaviest = max(tensors_of(module), key=tensor_bytes, default=None)
    return None if heaviest is None else str(heaviest.device)


def hooks_of(module: torch.nn.Module) -> tuple[str, ...]:
    """The offloading and casting hooks a live module already has, by diffusers' names, and streaming by vramplan."""
    found = {_accelerate_hook(child) for child in module.modules() if hasattr(child, "_hf_hook")}
    for child in module.modules():
        registry = getattr(child, "_diffusers_hook", None)
        if registry is not None:
            found |= {hook for hook in ("group_offloading", "layerwise_casting") if registry.get_hook(hook)}
    found |= {"weight_streaming"} if STREAMED in vars(module) else set()
    return tuple(sorted(found))


def _compute_element_bytes(role: Role, dtype: str, module: torch.nn.Module) -> int:
    """The bytes of one activation element: SDXL-family pipelines decode a float16 VAE in float32 (`force_upcast`)."""
    config = getattr(module, "config", {})
    if role == "vae" and dtype == "float16" and _config_get(config, "force_upcast"):
        return 4
    return {"float64": 8, "float32": 4}.get(dtype, 2)


def _group_refusal(module: torch.nn.Module) -> str | None:
    if getattr(module, "_supports_group_offloading", True) is False:
        return f"{type(module).__name__} does not support group offloading (_supports_group_offloading is False)"
    return None


def _block_refusal(role: Role, module: torch.nn.Module) -> str | None:
    """The reason against block-level groups: hooks of blocks would not run, or only after their weights are used."""
    name = type(module).__name__
    # A VAE's encode and decode never reach hooks on its top level, unless its class names its blocks.
    if role == "vae" and not getattr(module, "_group_offload_block_modules", None):
        return (
            f"block-level groups of {name} would never be loaded: encode() and decode() "
            "do not run the hooks (diffusers issue 12319); use leaf-level"
        )
    if any(_is_module_list(child) and any(map(_is_module_list, child.children())) for child in module.children()):
        return f"the blocks of {name} are lists of modules, which are never called themselves; use leaf-level"
    return _token_refusal(module)


def _token_refusal(module: torch.nn.Module) -> str | None:
    """The reason against block-level groups when a token embedding is used outside of the submodule that holds it.

    Models of pictures and texts look tokens up before they call their language model (transformers 5); an output
    layer that shares the embedding's weight runs after the language model has offloaded it.
    """
    path = block_modules_of(module)
    outside = module
    for name in path:
        forward = inspect.unwrap(type(outside).forward)
        if "get_input_embeddings" in forward.__code__.co_names:
            return (
                f"{type(outside).__name__} uses the token embedding of its {name} before the groups there are loaded; "
                "use leaf-level"
            )
        outside = getattr(outside, name)
    tokens, output = (_embedding_weight(module, kind) for kind in ("input", "output"))
    if path and tokens is not None and tokens is output:
        return (
            f"the output layer of {type(module).__name__} shares its weight with the token embedding, which is put "
            "away before it runs; use leaf-level"
        )
    return None


def _embedding_weight(module: torch.nn.Module, kind: str) -> torch.Tensor | None:
    try:
        return getattr(getattr(module, f"get_{kind}_embeddings")(), "weight", None)
    except (AttributeError, NotImplementedError):  # not a text model, or one that does not implement it
        return None


def _is_module_list(module: torch.nn.Module) -> bool:
    import torch

    return isinstance(module, torch.nn.ModuleList)


def _leaf_refusal(module: torch.nn.Module) -> str | None:
    """A module that calls multi_head_attention_forward reads its projection weights directly, so no hook loads them.

    Examples: torch.nn.MultiheadAttention, and HunyuanDiT's attention pool (diffusers 0.42).
    """
    for child in module.modules():
        code = getattr(type(child).forward, "__code__", None)
        if code is not None and "multi_head_attention_forward" in code.co_names:
            return (
                f"{type(module).__name__} contains {_class_path(type(child))}, whose weights are used without a call "
                "that would load them"
            )
    return None


def _disk_refusal(module: torch.nn.Module) -> str | None:
    """The reason against disk: a method other than forward reads the module's own tensors while they are in the file.

    PriorTransformer moves the statistics of its latents to the device itself, which hides from torch that they are
    not loaded: uninitialised memory would go into the picture (diffusers 0.42, `ModuleGroup._offload_to_disk`).
    """
    for name, read in reading_methods(module).items():
        return f"{type(module).__name__} reads {read} in {name}(), while it is in its file: leave disk out"
    return None


def _direct_call_refusal(pipeline: type | None, name: str, role: Role, module: torch.nn.Module) -> str | None:
    """The reason against block-level groups when the pipeline calls a layer directly.

    VAEs are exempt: they are always called by methods, and the blocks that their classes declare allow for that.
    """
    called = None if role == "vae" else called_directly(pipeline, name, module)
    if pipeline is None or called is None:
        return None
    return f"{pipeline.__name__} calls {called} of {name} directly, which loads no groups; use leaf-level"


def _direct_read_refusal(pipeline: type | None, name: str, module: torch.nn.Module) -> str | None:
    read = read_directly(pipeline, name, module)
    if pipeline is None or read is None:
        return None
    return f"{pipeline.__name__} reads {read} of {name} directly, while it is in its file: leave disk out"


def _sequential_refusal(module: torch.nn.Module) -> str | None:
    """Old-style weight_norm computes the weight before accelerate's hook has loaded its parts."""
    if any("weight_g" in child._parameters and "weight" not in child._parameters for child in module.modules()):
        return f"{type(module).__name__} uses torch.nn.utils.weight_norm, which runs before its weights are loaded"
    return None


def _class_path(cls: type) -> str:
    return f"{cls.__module__.removesuffix('.modules.activation')}.{cls.__name__}"


def _move_refusal(module: torch.nn.Module) -> str | None:
    if getattr(module, "is_loaded_in_8bit", False):
        return f"{type(module).__name__} is {EIGHT_BIT_STAYS}"
    return None


def _accelerate_hook(module: torch.nn.Module) -> str:
    hook = module._hf_hook
    names = [type(inner).__name__ for inner in getattr(hook, "hooks", (hook,))]
    return "model_cpu_offload" if "CpuOffload" in names else "sequential_cpu_offload"


def plain_config(module: torch.nn.Module) -> Mapping[str, Any]:
    """The configuration of a module, without its library's private keys."""
    config = getattr(module, "config", None)
    if config is None:
        return {}
    items = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {str(key): value for key, value in items.items() if not str(key).startswith("_")}


def _config_get(config: Any, key: str) -> Any:
    return config.get(key) if hasattr(config, "get") else getattr(config, key, None)


def _contains_any(marks: tuple[str, ...], text: str) -> bool:
    return any(mark in text for mark in marks)
