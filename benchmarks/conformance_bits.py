"""Call a pipeline for real on the CPU, plain and under every lossless plan, and hold the results against each other.

A plan is `ok` only where every tensor of the result is the same, bit for bit, where nothing is left on the pipeline
once it is undone (hooks, forwards, files, weights elsewhere or changed), and where a last plain call still makes the
same. What a card with streams would do runs on the CPU without one. Two things are otherwise than on a card, and
put right here: accelerate's hooks of sequential offload lose parameters between the CPU and the CPU of number 0, and
weights read from a file stay where it is mapped, unaligned, which makes the CPU add in another order. Weights that are
streamed from a file are mapped as `from_pretrained` leaves them: the copies that run are aligned.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from conformance_machine import all_streamed, half_streamed

# Placements of a component. Numbers of blocks depend on it.
BITS: Mapping[str, str | Callable[[Any], str]] = {
    "bits-resident": "resident",  # with sliced decoding, where there is one: by itself it does nothing on the CPU
    "bits-model": "model_cpu_offload",
    "bits-sequential": "sequential_cpu_offload",
    "bits-leaf": "group_offload:type=leaf",
    "bits-block": "group_offload",
    "bits-disk": "group_offload:disk=true",
    "bits-stream": all_streamed,
    "bits-half": half_streamed,
    "bits-phase": "weight_streaming",
}
MAPPED = "bits-phase"  # with weights that are pages of a file
Outcome = tuple[str, str]


def outcomes(
    pipe: Any, inputs: Callable[[], dict[str, Any]], names: Sequence[str], limited: Callable[[], Any]
) -> Iterator[tuple[str, Outcome]]:
    """A status and a reason for each of the plans. `limited` makes a context that ends what takes too long."""
    with _smaller_pictures(pipe):
        yield from _outcomes(pipe, inputs, names, limited)


@contextmanager
def _smaller_pictures(pipe: Any) -> Iterator[None]:
    """Inside, Qwen's pipelines that edit scale a picture to a 64th of a megapixel: a megapixel takes minutes a call."""
    module = sys.modules[type(pipe).__module__]
    real = getattr(module, "calculate_dimensions", None)
    if real is None:
        yield
    else:
        with patch.object(module, "calculate_dimensions", lambda area, ratio: real(area / 64, ratio)):
            yield


def _outcomes(
    pipe: Any, inputs: Callable[[], dict[str, Any]], names: Sequence[str], limited: Callable[[], Any]
) -> Iterator[tuple[str, Outcome]]:
    try:
        with limited():
            if hasattr(pipe, "set_progress_bar_config"):
                pipe.set_progress_bar_config(disable=True)
            plain = tensors_of(pipe(**inputs()))
            unfit = differing(plain, tensors_of(pipe(**inputs())))
    except BaseException as error:
        yield from ((name, ("unfit", f"the plain call fails: {_line(error)}")) for name in names)
        return
    if unfit or not any(tensor.isfinite().any() for tensor in plain):
        reason = f"two plain calls differ: {unfit}" if unfit else "the result holds no numbers"
        yield from ((name, ("unfit", reason)) for name in names)
        return
    found = {name: _outcome(pipe, inputs, name, plain, limited) for name in names}
    try:
        with limited():
            after = differing(plain, tensors_of(pipe(**inputs())))
    except BaseException as error:
        after = _line(error)
    for name, outcome in found.items():
        yield (
            name,
            ("failed", f"other bits after all were undone: {after}") if after and outcome[0] == "ok" else outcome,
        )


def _outcome(
    pipe: Any, inputs: Callable[[], dict[str, Any]], name: str, plain: Sequence[Any], limited: Callable[[], Any]
) -> Outcome:
    from vramplan.api.apply import apply_plan

    with tempfile.TemporaryDirectory() as folder, _cpu_as_card(folder), ExitStack() as files:
        try:
            with limited():
                plan = _plan(pipe, BITS[name])
                if isinstance(plan, str):
                    return "refused", plan
                before = _State(pipe)
                if name == MAPPED:
                    files.enter_context(_mapped(pipe))
                applied = apply_plan(pipe, plan, device="cpu")
                try:
                    planned = tensors_of(pipe(**inputs()))
                finally:
                    applied.undo()
        except BaseException as error:
            return "failed", _line(error)
        left = before.wrong(Path(folder))
    if different := differing(plain, planned):
        return "failed", f"other bits with the plan: {different}"
    return ("failed", f"after undoing {left}") if left else ("ok", "")


@contextmanager
def _cpu_as_card(folder: str) -> Iterator[None]:
    """Inside, the CPU takes what is for a card, and files go to the folder."""
    import accelerate
    import safetensors.torch
    import torch

    import vramplan.runtime.applied
    from vramplan.strategies.sequential_cpu_offload import SequentialCpuOffload

    real, from_file = accelerate.cpu_offload, safetensors.torch.load_file

    def offload(model: Any, _: Any, **options: Any) -> Any:
        return real(model, torch.device("cpu"), **options)

    def loaded(*args: Any, **options: Any) -> Any:
        return {name: tensor.clone() for name, tensor in from_file(*args, **options).items()}

    def sequential(_: Any, pipe: Any, names: Sequence[str], device: str) -> None:
        pipe.enable_sequential_cpu_offload(device=device)

    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {"VRAMPLAN_OFFLOAD": folder}))
        stack.enter_context(patch.object(accelerate, "cpu_offload", offload))
        stack.enter_context(patch.object(safetensors.torch, "load_file", loaded))
        stack.enter_context(patch.object(SequentialCpuOffload, "apply", sequential))
        stack.enter_context(
            patch.object(vramplan.runtime.applied, "planned_accelerator", lambda plan, _: plan.machine.accelerator)
        )
        yield


@contextmanager
def _mapped(pipe: Any) -> Iterator[None]:
    """Inside, weights are pages of safetensors files, where the file can hold them as they are."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from vramplan.pipeline.modules import modules_of

    weights = {id(each): each for module in modules_of(pipe).values() for each in module.parameters()}
    plain = {str(key): each for key, each in weights.items() if type(each.data) is torch.Tensor}
    kept = {key: each.data for key, each in plain.items() if each.is_contiguous() and not each.is_meta}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.safetensors")
        save_file({key: data.clone() for key, data in kept.items()}, path)
        with safe_open(path, "pt") as file:
            for key in kept:
                plain[key].data = file.get_tensor(key)
        try:
            yield
        finally:
            for key, data in kept.items():
                plain[key].data = data


class _State:
    """What a pipeline is, seen from outside."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        before = _weights(pipe)
        self.ties = _ties(before)
        self.values = {name: tensor.clone() for name, tensor in before.items()}
        self.hooked = _hooked(pipe)

    def wrong(self, folder: Path) -> str:
        """What is not as it was, empty for nothing."""
        import torch

        now = _weights(self.pipe)
        if _ties(now) != self.ties:
            return "weights have other names, or share their memory with others"
        for name, tensor in now.items():
            if tensor.is_meta or not torch.equal(tensor.nan_to_num(), self.values[name].nan_to_num()):
                return f"{name} has another value"
        if hooked := _hooked(self.pipe) ^ self.hooked:
            return f"hooks differ: {sorted(hooked)[:3]}"
        left = [str(path) for path in folder.rglob("*")]
        return f"files are left: {left[:3]}" if left else ""


def _weights(pipe: Any) -> dict[str, Any]:
    from vramplan.pipeline.modules import modules_of

    return {
        f"{part}.{path}.{name}": tensor
        for part, module in modules_of(pipe).items()
        for path, child in module.named_modules()
        for name, tensor in (*child._parameters.items(), *child._buffers.items())
        if tensor is not None
    }


def _ties(weights: Mapping[str, Any]) -> set[tuple[str, ...]]:
    """The names of each tensor."""
    found: dict[int, list[str]] = {}
    for name, tensor in weights.items():
        found.setdefault(id(tensor), []).append(name)
    return {tuple(names) for names in found.values()}


def _hooked(pipe: Any) -> set[str]:
    """Where there are hooks of any kind, and attributes or classes in place of their class's; pipelines included."""
    from vramplan.pipeline.modules import modules_of
    from vramplan.pipeline.own_class import plain_class

    modules = {
        f"{part}.{path}": child for part, module in modules_of(pipe).items() for path, child in module.named_modules()
    }
    pipes = {"pipe": pipe} | {name: part for name, part in vars(pipe).items() if hasattr(part, "components")}
    found = {f"{name}: {mark}" for name, child in modules.items() for mark in _marks(child)}
    things = modules | pipes
    found |= {f"{name}: its class" for name, thing in things.items() if plain_class(thing) is not type(thing)}
    return found | {name for name, part in pipes.items() if getattr(part, "_all_hooks", None)}


def _marks(child: Any) -> Iterator[str]:
    """What tells that something was put on a module: attributes, and the hooks of each kind by their number."""
    own = vars(child)
    yield from (key for key in own if key in ("forward", "_apply", "_hf_hook") or key.startswith("_vramplan"))
    yield from (f"{len(hooks)} of {key}" for key, hooks in own.items() if key.endswith("_hooks") and hooks)
    if getattr(own.get("_diffusers_hook"), "hooks", None):
        yield "_diffusers_hook"


def _plan(pipe: Any, form: str | Callable[[Any], str]) -> Any:
    """The plan that places every component so that can be, the others resident; or why none can."""
    from conformance_machine import accelerator

    from vramplan import plan
    from vramplan.errors import VramplanError
    from vramplan.hardware.types import Hardware, Host
    from vramplan.pipeline.live import spec_from_pipeline
    from vramplan.strategies.settings import parse_placement

    card = accelerator()
    spec = spec_from_pipeline(pipe)
    placements = {c.name: form if isinstance(form, str) else form(c) for c in spec.components}
    settings = {name: parse_placement(text) for name, text in placements.items()}
    reasons = {c.name: settings[c.name].complete(c).refusal(c, spec, card) for c in spec.components}
    able = [name for name, reason in reasons.items() if reason is None]
    whole = any(setting.whole_pipeline for setting in settings.values())
    if not able or (whole and len(able) < len(reasons)):
        return next(reason for reason in reasons.values() if reason is not None)
    fixed: dict[str, Any] = {f"placement.{name}": placements[name] if name in able else "resident" for name in reasons}
    fixed = {"placement": form} if whole else fixed
    vae = getattr(pipe, "vae", None)
    decodes = ["vae_slicing"] if form == "resident" and hasattr(vae, "use_slicing") else []
    if getattr(vae, "use_tiling", False):  # it comes so, and may not do without
        decodes.append("vae_tiling")
    sizes = {"height": 1024, "width": 1024} if "vae_tiling" in decodes else {}
    machine = Hardware(accelerators=(card,), host=Host(total_bytes=1 << 40, available_bytes=1 << 40))
    try:
        return plan(pipe, device=machine, settings=fixed | {"decode": decodes or "plain"}, simulate=False, **sizes)
    except VramplanError as error:
        return str(error)


def tensors_of(result: Any) -> list[Any]:
    """Every tensor of a result, pictures and arrays as tensors too, in order."""
    import numpy
    import torch

    if isinstance(result, torch.Tensor):
        return [result.clone()]
    if isinstance(result, numpy.ndarray):
        return [torch.from_numpy(result.copy())]
    if hasattr(result, "getdata"):
        return [torch.from_numpy(numpy.array(result))]
    if isinstance(result, dict):
        return [tensor for item in result.values() for tensor in tensors_of(item)]
    if isinstance(result, list | tuple):
        return [tensor for item in result for tensor in tensors_of(item)]
    return []


def differing(one: Sequence[Any], two: Sequence[Any]) -> str:
    """Where two results differ, empty for nowhere. What is no number is equal to itself."""
    import torch

    if len(one) != len(two):
        return f"{len(one)} tensors and {len(two)}"
    for place, (before, after) in enumerate(zip(one, two, strict=True)):
        if before.dtype != after.dtype or not torch.equal(before.nan_to_num(), after.nan_to_num()):
            return f"tensor {place} of {len(one)}"
    return ""


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
