"""Find layers and tensors of a component that a pipeline's own code uses without calling the component.

Hooks on the component run in its own forward. If the pipeline calls one of its layers directly, as Stable Diffusion
does with the text encoder's last norm for `clip_skip`, or reads one of its tensors, no hook has loaded the weights.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# transformers' accessors, which find a layer by a configured name (5.14, `EmbeddingAccessMixin`)
_ACCESSORS = frozenset({"get_input_embeddings", "get_output_embeddings"})
Path = tuple[str, ...]


def called_directly(pipeline: type | None, name: str, module: torch.nn.Module) -> str | None:
    """The layer of the component, or method that runs layers, that the pipeline calls directly; None without one."""
    for path, called in _accesses(pipeline).get(name, ()):
        holder, rest = _descend(module, path)
        if called and (_runs_layers(holder, rest) if rest else holder is not module and _has_tensors(holder)):
            return ".".join(path)
    return None


def read_directly(pipeline: type | None, name: str, module: torch.nn.Module) -> str | None:
    """The parameter or buffer of the component that the pipeline reads directly; None without one."""
    for path, _ in _accesses(pipeline).get(name, ()):
        holder, rest = _descend(module, path)
        if rest and rest[0] in own_tensors(holder):
            return ".".join(path[: len(path) - len(rest) + 1])
    return None


def reading_methods(module: torch.nn.Module) -> dict[str, str]:
    """The methods of the module's class that read a tensor of its own, which no forward calls; with its name."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    called = {"__init__", "forward", *(code.co_names if code else ())}
    own = own_tensors(module)
    found = {
        name: own & set(inspect.unwrap(method).__code__.co_names)
        for name, method in vars(type(module)).items()
        if name not in called and inspect.isfunction(method)
    }
    return {name: min(read) for name, read in found.items() if read}


def called_by_place(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The submodules that the module's own forward calls by a place in a list, past the item there.

    DiT's last layer calls `self.transformer_blocks[0].norm1.emb` (diffusers 0.42).
    """
    paths = (tuple(path.split(".")) for path in _places(inspect.unwrap(type(module).forward)))
    found = (_descend(module, path) for path in paths)
    return [inner for inner, rest in found if not rest and _has_tensors(inner)]


@lru_cache
def _places(forward: Callable[..., object]) -> tuple[str, ...]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return ()
    called = (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    found = (re.fullmatch(r"self((?:\.\w+)+)\[(\d+)\]((?:\.\w+)+)", text) for text in called)
    return tuple(sorted({f"{each[1]}.{each[2]}{each[3]}"[1:] for each in found if each}))


def own_tensors(module: torch.nn.Module) -> set[str]:
    """The names of a module's own parameters and buffers, without those of its submodules."""
    return {name for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}


def _descend(module: torch.nn.Module, path: Path) -> tuple[torch.nn.Module, Path]:
    """Follow the path through submodules; return the last one and the rest of the path."""
    for number, step in enumerate(path):
        child = module._modules.get(step)
        if child is None:
            return module, path[number:]
        module = child
    return module, ()


def _runs_layers(module: torch.nn.Module, rest: Path) -> bool:
    """Whether `rest` is a method of the module that uses its weights."""
    if len(rest) > 1 or rest[0] == "forward":
        return False
    if rest[0] in _ACCESSORS:
        return True
    method = getattr(type(module), rest[0], None)
    code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
    if code is None:
        return False
    layers = {name for name, child in module._modules.items() if child is not None and _has_tensors(child)}
    return not (layers | own_tensors(module)).isdisjoint(code.co_names)


def _has_tensors(module: torch.nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


@lru_cache
def _accesses(cls: type | None) -> dict[str, list[tuple[Path, bool]]]:
    """The attribute paths used in the class's code, by the first name (without `self`), sorted, each with whether it is
    called or passed on."""
    found: dict[str, list[tuple[Path, bool]]] = {}
    for base in () if cls is None else cls.__mro__:
        # loading of adapters and textual inversions is not part of a call
        if not base.__module__.startswith(("diffusers.loaders.", "diffusers.pipelines.pipeline_utils")):
            for name, path, called in _attribute_chains(base):
                found.setdefault(name, []).append((path, called))
    return {name: sorted(set(paths)) for name, paths in found.items()}


def _attribute_chains(cls: type) -> Iterator[tuple[str, Path, bool]]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):  # built in, or defined without a file
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):  # the constructor runs before any hook is set
            node.body = [item for item in node.body if getattr(item, "name", "") != "__init__"]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {id(node.func) for node in calls} | {id(handed) for node in calls for handed in _passed_arguments(node)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner and len(names := _names(node)) > 1:
            yield names[0], names[1:], id(node) in called


def _passed_arguments(call: ast.Call) -> Iterator[ast.expr]:
    """The arguments that the called function may call: Motif-Video passes its text encoder's vision tower to one."""
    if not (isinstance(call.func, ast.Name) and hasattr(builtins, call.func.id)):
        yield from call.args
        yield from (keyword.value for keyword in call.keywords)


def _names(node: ast.expr) -> Path:
    """The names in `a.b.c`, without a leading `self`; empty if it starts with another expression."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ()
    return tuple(reversed(names if node.id == "self" else [*names, node.id]))
