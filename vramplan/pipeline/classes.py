"""Read a pipeline class without an instance: the order of its components, their names, and limits."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from vramplan.workload import FRAME_ARGUMENTS

# Arguments of a call that make the VAE encode a picture before denoising starts, so that it is on the
# device together with the denoiser. `ip_adapter_image` and its kind go to an image encoder instead.
_CONDITION_ARGUMENTS = frozenset(
    {
        "image",
        "images",
        "video",
        "mask_image",
        "control_image",
        "control_video",
        "init_image",
        "source_image",
        "reference_image",
        "reference_images",
        "conditioning_frames",
        "masked_image_latents",
        "original_image",
        "conditions",
    }
)
# HunyuanImage calls its second text encoder only for prompts with quoted text (diffusers 0.42,
# pipeline_hunyuanimage.py `encode_prompt`); the chain then leaves the first one on the device.
_OPTIONAL_USES = {"HunyuanImagePipeline": frozenset({"text_encoder_2"})}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassFacts:
    """The facts about a pipeline class. `problem` says why its pipelines cannot be planned, None if they can."""

    name: str
    sequence: tuple[str, ...] | None
    expected: tuple[str, ...]
    optional: frozenset[str]
    excluded: frozenset[str]
    unknown_in_sequence: tuple[str, ...]
    video: bool
    conditions: bool
    optional_uses: frozenset[str]
    frees_hooks: bool
    sound: bool = False
    problem: str | None = None


def class_facts(cls: type) -> ClassFacts:
    """Read the facts from the class alone. Never raises for a class that diffusers exports."""
    sequence = parse_sequence(getattr(cls, "model_cpu_offload_seq", None))
    expected = _expected_components(cls)
    call = next((vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base)), None)
    arguments = frozenset(_parameters(call)) if call is not None else frozenset()
    return ClassFacts(
        name=cls.__name__,
        sequence=sequence,
        expected=expected,
        optional=frozenset(getattr(cls, "_optional_components", None) or ()),
        excluded=frozenset(getattr(cls, "_exclude_from_cpu_offload", None) or ()),
        unknown_in_sequence=tuple(name for name in sequence or () if name not in expected),
        video=not arguments.isdisjoint(FRAME_ARGUMENTS) or "Video" in cls.__name__,
        sound="height" not in arguments and ("Audio" in cls.__name__ or any("audio" in name for name in arguments)),
        conditions=not _CONDITION_ARGUMENTS.isdisjoint(arguments),
        optional_uses=_OPTIONAL_USES.get(cls.__name__, frozenset()),
        frees_hooks=_mentions(call, "maybe_free_model_hooks"),
        problem=_problem(cls, expected, call),
    )


def parse_sequence(text: str | None) -> tuple[str, ...] | None:
    """Split `"text_encoder->transformer->vae"` into names; None stays None, `""` gives no names."""
    return None if text is None else tuple(part.strip() for part in text.split("->") if part.strip())


def _expected_components(cls: type) -> tuple[str, ...]:
    return tuple(name for name in _parameters(cls.__init__) if name not in ("self", "args", "kwargs"))  # type: ignore[misc]


def _parameters(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(inspect.unwrap(function)).parameters)
    except (TypeError, ValueError):
        return ()


def _mentions(function: Any, name: str) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    return code is not None and name in code.co_names


def _problem(cls: type, expected: tuple[str, ...], call: Any) -> str | None:
    if cls.__name__.startswith("Onnx") or cls.__name__.endswith("OnnxPipeline"):
        return "runs in ONNX Runtime, which manages its own memory"
    if call is None or inspect.isabstract(cls):
        return "has no __call__ of its own"
    if not expected:
        return "takes no components by name"
    return None
