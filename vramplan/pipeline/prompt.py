"""Encode a prompt with only the text encoders loaded, and run the rest of the call without them.

The pipeline's own code shows how it calls `encode_prompt`, and which of its arguments accept the results: its call is
run up to the first component that is not a text encoder, and every `encode_prompt` in it is recorded. The names of the
variables that receive the results are the names of the call's arguments for them.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import Any

from vramplan.errors import VramplanError

_METHOD = "encode_prompt"
# Pipelines call these methods of a VAE, not its forward.
_VAE_METHODS = ("encode", "decode")
_REPEATS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


class EncodeError(VramplanError):
    """The prompt cannot be encoded separately from the rest of the call. The message says why."""


class _EnteredError(Exception):
    """The call has reached a component that is not a text encoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """One `encode_prompt` of a call: its arguments, the variables assigned to, and the results."""

    given: Mapping[str, Any]
    names: tuple[str, ...]
    results: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A call with an encoded prompt: the encodings, and the arguments of the call that uses them."""

    encodings: tuple[Encoding, ...]
    arguments: Mapping[str, Any]


def encode(pipe: Any, arguments: Mapping[str, Any], encoders: Sequence[str]) -> Encoded:
    """Encode the prompt of the call `pipe(**arguments)`. Only the components named in `encoders` run.

    The others may be without weights. Generators among the arguments keep their state.

    Raises:
        EncodeError: the pipeline does not encode its prompt separately, or does not accept it encoded.
    """
    cls: Any = type(pipe)
    sites = _sites(cls)
    found: list[Encoding] = []
    states = [(item, item.get_state()) for item in generators(arguments)]
    try:
        with _record_encodings(pipe, sites, found), _stop_at_other_components(pipe, encoders):
            pipe(**arguments)
    except _EnteredError as entered:
        if not found:
            raise EncodeError(f"{type(pipe).__name__} runs {entered} before it encodes its prompt") from None
    finally:
        for generator, state in states:
            generator.set_state(state)
    return Encoded(encodings=tuple(found), arguments=_arguments(cls, arguments, found))


def call_encoded(pipe: Any, encoded: Encoded) -> Any:
    """Run the rest of the call, on a pipeline whose text encoders are None.

    Raises:
        EncodeError: the call would have used other embeddings than those encoded.
    """
    with check_encodings(pipe, encoded):
        return pipe(**encoded.arguments)


def encode_refusal(cls: type) -> str | None:
    """Why the prompt cannot be encoded separately, judged by the class's source; None if it can."""
    try:
        _sites(cls)
    except (EncodeError, OSError, TypeError) as error:
        return str(error)
    return None


def generators(arguments: Mapping[str, Any]) -> list[Any]:
    """The random generators among the arguments of a call."""
    import torch

    given = arguments.get("generator")
    listed = given if isinstance(given, list | tuple) else [given]
    return [item for item in listed if isinstance(item, torch.Generator)]


@cache
def _sites(cls: Any) -> Mapping[range, tuple[str, ...]]:
    """The lines of each `self.encode_prompt(...)` in the class's call, and the variables assigned to."""
    if not callable(getattr(cls, _METHOD, None)):
        raise EncodeError(f"{cls.__name__} has no {_METHOD}: its prompt cannot be encoded apart from the call")
    function = inspect.unwrap(cls.__call__)
    first = function.__code__.co_firstlineno - 1
    found = {}
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Assign) and _is_encoding(node.value):
            names = _names(node.targets[0])
            if names:
                found[range(first + node.value.lineno, first + (node.value.end_lineno or 0) + 1)] = names
    if not found:
        raise EncodeError(f"{cls.__name__} does not call {_METHOD} itself, so that its results cannot be identified")
    return found


def _is_encoding(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{_METHOD}"


def _names(target: ast.expr) -> tuple[str, ...]:
    """The variables of an assignment; empty if a target is not a variable."""
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    names = tuple(part.id for part in parts if isinstance(part, ast.Name))
    return names if len(names) == len(parts) else ()


@contextmanager
def _record_encodings(pipe: Any, sites: Mapping[range, tuple[str, ...]], found: list[Encoding]) -> Iterator[None]:
    """Context manager: append every `encode_prompt` of the pipeline's call to `found`."""
    original: Callable[..., Any] = getattr(pipe, _METHOD)
    signature = inspect.signature(original)

    def record(*args: Any, **kwargs: Any) -> Any:
        line = sys._getframe(1).f_lineno
        results = original(*args, **kwargs)
        names = next((names for lines, names in sites.items() if line in lines), None)
        listed = results if isinstance(results, tuple) else (results,)
        if names is None or len(names) != len(listed):
            raise EncodeError(f"{type(pipe).__name__}: the results of {_METHOD} cannot be matched to names")
        given = dict(signature.bind(*args, **kwargs).arguments)
        found.append(Encoding(given=given, names=names, results=listed))
        return results

    with _replace_attribute(pipe, _METHOD, record):
        yield


@contextmanager
def check_encodings(pipe: Any, encoded: Encoded) -> Iterator[None]:
    """Context manager: every `encode_prompt` must return the recorded results, bit for bit."""
    original: Callable[..., Any] = getattr(pipe, _METHOD)
    expected = cycle(encoded.encodings)

    def check(*args: Any, **kwargs: Any) -> Any:
        results = original(*args, **kwargs)
        listed = results if isinstance(results, tuple) else (results,)
        before = next(expected).results
        if len(before) != len(listed) or not all(map(_equal, before, listed)):
            raise EncodeError(f"{type(pipe).__name__} does not take its prompt encoded as its own {_METHOD} does it")
        return results

    with _replace_attribute(pipe, _METHOD, check):
        yield


def _equal(one: Any, other: Any) -> bool:
    """Whether two results are equal; simulated tensors, if shape and dtype are."""
    import torch

    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return (one is None) == (other is None)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if type(one) is not torch.Tensor:
        return True
    bits, others = (tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other))
    return torch.equal(bits, others)


@contextmanager
def _replace_attribute(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Context manager: replace an attribute on the object itself, and restore its own value afterwards."""
    had = name in vars(owner)
    before = vars(owner).get(name)
    vars(owner)[name] = function
    try:
        yield
    finally:
        if had:
            vars(owner)[name] = before
        else:
            vars(owner).pop(name, None)


@contextmanager
def _stop_at_other_components(pipe: Any, encoders: Sequence[str]) -> Iterator[None]:
    """Context manager: the call ends with _EnteredError at the first component that is not an encoder."""
    from vramplan.pipeline.modules import modules_of

    def stop(name: str) -> Callable[..., Any]:
        def entered(*_: Any, **__: Any) -> Any:
            raise _EnteredError(name)

        return entered

    with ExitStack() as stack:
        for name, module in modules_of(pipe).items():
            if name in encoders:
                continue
            stack.callback(module.register_forward_pre_hook(stop(name)).remove)
            for method in _VAE_METHODS:
                if callable(getattr(module, method, None)):
                    stack.enter_context(_replace_attribute(module, method, stop(name)))
        yield


def _arguments(cls: type, arguments: Mapping[str, Any], found: Sequence[Encoding]) -> dict[str, Any]:
    """The call's arguments with embeddings in place of texts; a repeat count that encoding has applied becomes 1."""
    takes = inspect.signature(inspect.unwrap(cls.__call__)).parameters
    embeddings = {
        name: result
        for encoding in found
        for name, result in zip(encoding.names, encoding.results, strict=True)
        if name in takes and result is not None
    }
    if not embeddings:
        raise EncodeError(f"{cls.__name__} does not take its prompt encoded")
    encodes = inspect.signature(getattr(cls, _METHOD)).parameters
    rest = dict(arguments)
    for name, parameter in takes.items():
        if name in encodes and _is_text(arguments.get(name, parameter.default)):
            rest[name] = None  # dropped below if None is its default
    for name in _REPEATS:
        if name in takes and all(name in encoding.given for encoding in found):
            rest[name] = 1
    kept = {name: value for name, value in rest.items() if value is not None or takes[name].default is not None}
    return kept | embeddings


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
