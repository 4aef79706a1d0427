"""Faults at every line: run something once to learn its lines, then again with an exception at each of them."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import accelerate
import diffusers
import safetensors
import torch

import vramplan
from vramplan.pipeline.modules import modules_of

_ROOTS = {
    vramplan: ("api/apply.py", "runtime/applied.py", "runtime/snapshot.py", "strategies"),
    diffusers: ("hooks", "pipelines/pipeline_utils.py", "models/modeling_utils.py", "models/autoencoders/vae.py"),
    accelerate: ("hooks.py", "big_modeling.py", "utils/modeling.py"),
    torch: ("nn/modules/module.py",),
    safetensors: ("torch.py",),
}
_WATCHED = tuple(str(Path(str(library.__file__)).parent / path) for library, paths in _ROOTS.items() for path in paths)
assert all(Path(path).exists() for path in _WATCHED), "a watched file or folder has moved"
_OWN = str(Path(str(vramplan.__file__)).parent)
# Left out: where Ctrl-C is held back, and what of torch only reads.
_HELD = ("uninterrupted",)
_MOVES = ("_apply", "to", "convert", "compute_should_use_set_data")

Line = tuple[str, int]
ERRORS = (
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB"),
    lambda: ArithmeticError("something else"),  # none that reading a number answers
    KeyboardInterrupt,
)


@contextmanager
def tracing(on_line: Callable[[FrameType], None]) -> Iterator[None]:
    """Call `on_line` before every line of what is watched."""

    def within(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            on_line(frame)
        return within

    def start(frame: FrameType, event: str, arg: Any) -> Any:
        return within if _watched(frame.f_code) else None

    before = sys.gettrace()
    sys.settrace(start)
    try:
        yield
    finally:
        sys.settrace(before)


_known: dict[int, tuple[CodeType, bool]] = {}


def _watched(code: CodeType) -> bool:
    found = _known.get(id(code))  # hashing a code object itself takes long
    if found is None:
        path, name = code.co_filename, code.co_name
        watched = path.startswith(_WATCHED) and name not in _HELD and ("/nn/modules/" not in path or name in _MOVES)
        found = _known[id(code)] = code, watched
    return found[1]


def lines_of(act: Callable[[], Any]) -> list[Line]:
    """Every line that runs, in order."""
    seen: list[Line] = []
    with tracing(lambda frame: seen.append((frame.f_code.co_filename, frame.f_lineno))):
        act()
    assert any(path.startswith(_OWN) for path, _ in seen), "no line of vramplan was watched: is _ROOTS out of date?"
    return seen


@contextmanager
def failing_at(place: int, error: BaseException) -> Iterator[list[Line]]:
    """The error is raised before the line that is run as number `place`; where that is, the list tells afterwards."""
    left, struck = [place], list[Line]()

    def count(frame: FrameType) -> None:
        left[0] -= 1
        if left[0] == -1:
            struck.append((frame.f_code.co_filename, frame.f_lineno))
            raise error

    with tracing(count):
        yield struck


def chosen(lines: list[Line]) -> list[int]:
    """Of every line the first run, the middle one and the last."""
    runs: dict[Line, list[int]] = {}
    for place, line in enumerate(lines):
        runs.setdefault(line, []).append(place)
    return sorted({place for at in runs.values() for place in (at[0], at[len(at) // 2], at[-1])})


def kept(pipe: Any) -> dict[str, Any]:
    """Everything of the pipeline that applying may change: what it is and what it holds, object by object."""
    found: dict[str, Any] = {"": _attributes(pipe)}
    for name, module in modules_of(pipe).items():
        for path, child in module.named_modules():
            found[f"{name}.{path}"] = _attributes(child)
            registry = vars(child).get("_diffusers_hook")
            if registry is not None:
                found[f"{name}.{path}#hooks"] = _attributes(registry)
    return found


def _attributes(thing: Any) -> dict[str, Any]:
    return {key: _identity(value) for key, value in vars(thing).items()}


def _identity(value: Any) -> Any:
    if isinstance(value, dict):
        return id(value), [(key, id(item)) for key, item in value.items()]
    if isinstance(value, list):
        return id(value), [id(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else id(value)


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    """Every tensor by every name it has."""
    return {
        f"{part}.{path}.{name}": tensor
        for part, module in modules_of(pipe).items()
        for path, child in module.named_modules()
        for name, tensor in (*child._parameters.items(), *child._buffers.items())
        if tensor is not None
    }


class Witness:
    """What a pipeline is now, to hold it against later."""

    def __init__(self, pipe: Any, folder: Path) -> None:
        self.pipe = pipe
        self.folder = folder
        self.before = kept(pipe)
        self.values = {name: tensor.detach().clone() for name, tensor in weights(pipe).items()}
        self.devices = {name: tensor.device for name, tensor in weights(pipe).items()}
        self.threads = set(threading.enumerate())
        self.tensors = live_tensors()

    def wrong(self, *, objects: bool = True) -> str:
        """What differs, empty for nothing. Without `objects` only what can be seen from outside."""
        now = weights(self.pipe)
        if now.keys() != self.values.keys():
            return f"weights by other names: {sorted(now.keys() ^ self.values.keys())[:3]}"
        for name, tensor in now.items():
            before = self.values[name]
            if tensor.device != self.devices[name] or tensor.dtype != before.dtype:
                return f"{name} is {tensor.dtype} on {tensor.device}"
            if not torch.equal(tensor, before):
                return f"{name} has another value"
        left = [str(path) for path in self.folder.rglob("*")] if self.folder.exists() else []
        if left:
            return f"files are left: {left[:3]}"
        if set(threading.enumerate()) != self.threads:
            return "threads are left"
        return self._other_objects() if objects else ""

    def _other_objects(self) -> str:
        after = kept(self.pipe)
        for name in after.keys() | self.before.keys():
            one, two = self.before.get(name, {}), after.get(name, {})
            differing = [key for key in one.keys() | two.keys() if one.get(key) != two.get(key)]
            if differing:
                return f"{name or 'pipe'}: other {differing}"
        return ""

    def more_tensors(self) -> int:
        """How many tensors are alive that were not."""
        return live_tensors() - self.tensors


def live_tensors() -> int:
    """The tensors that Python holds on to."""
    gc.collect()
    return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
