"""Stand-ins for the device functions that diffusers and accelerate call, patched only while a simulation runs."""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from vramplan.simulator.engine import Engine
from vramplan.simulator.kernels import attention_flops, attention_kind
from vramplan.simulator.ledger import Block, Ledger
from vramplan.simulator.shapes import normalize_device
from vramplan.simulator.streams import SimulatedBackend
from vramplan.simulator.tensor import SimTensor
from vramplan.streaming import backend


class SimStream:
    """A stream without a device. Memory allocated while it is current belongs to its pool.

    Blocks given to `record_stream` stay alive until the stream has been entered twice more: the host runs about one
    group ahead of the device.
    """

    def __init__(self, ledger: Ledger, number: int) -> None:
        self.ledger = ledger
        self.number = number
        self.recorded: deque[list[Block]] = deque([[]], maxlen=2)

    def record(self, block: Block) -> None:
        """Keep the block alive until the stream has been entered twice more."""
        self.recorded[-1].append(block)

    def synchronize(self) -> None:
        """Release all recorded blocks."""
        self.recorded.clear()
        self.recorded.append([])


class SimBackend:
    """The part of `torch.cuda` that diffusers' group offloading calls: streams, without time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._default = SimStream(engine.ledger, 0)
        self._count = 0

    def Stream(self, *args: Any, **kwargs: Any) -> SimStream:  # noqa: N802 - torch's name
        """A new side stream."""
        self._count += 1
        return SimStream(self._engine.ledger, self._count)

    def current_stream(self, *args: Any) -> SimStream:
        """The stream the computation runs on."""
        return self._default

    def is_available(self) -> bool:
        """Report that streams exist."""
        return True

    def synchronize(self, *args: Any) -> None:
        """Do nothing: no work is ever in flight."""

    @contextmanager
    def stream(self, stream: SimStream) -> Iterator[None]:
        """Context manager: memory allocated inside belongs to the stream."""
        before = self._engine.ledger.stream
        self._engine.ledger.stream = stream.number
        self._default.recorded.append([])
        try:
            yield
        finally:
            self._engine.ledger.stream = before


_Generator = torch.Generator


class _AnyGenerator(type(torch.Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _Generator)


class SimGenerator(torch.Generator, metaclass=_AnyGenerator):
    """A CPU generator in place of one for a simulated device. Every torch.Generator counts as an instance."""

    def __new__(cls, device: Any = None) -> SimGenerator:
        """Create a CPU generator, whatever the device."""
        return super().__new__(cls)


@contextmanager
def patched_runtime(engine: Engine) -> Iterator[None]:
    """Context manager: patch in the stand-ins, and remove them on every exit."""
    import accelerate.hooks
    import accelerate.utils.modeling
    from diffusers.pipelines import pipeline_utils
    from torch.nn.attention import flex_attention as flex

    streams = SimBackend(engine)

    def empty_cache(*args: Any, **kwargs: Any) -> None:
        engine.ledger.empty_cache()

    with ExitStack() as stack:
        for module, name, stand_in in (
            *_stream_stand_ins(streams),
            (backend, "backend_for", partial(SimulatedBackend, engine)),
            (pipeline_utils, "empty_device_cache", empty_cache),
            (accelerate.hooks, "clear_device_cache", empty_cache),
            (accelerate.utils.modeling, "clear_device_cache", empty_cache),
            (torch.cuda, "empty_cache", empty_cache),
            (torch, "Generator", SimGenerator),
            *_file_stand_ins(engine),
        ):
            if hasattr(module, name):
                stack.enter_context(patch.object(module, name, stand_in))
        for module in _modules_without_ftfy():
            stack.enter_context(patch.object(module, "ftfy", _ftfy_stand_in(engine), create=True))
        stack.enter_context(_hide_warnings())
        stack.enter_context(_default_kernels())
        stack.enter_context(torch.random.fork_rng(devices=[]))  # keeps the caller's random state
        stack.enter_context(patch.object(flex, "flex_attention", _flex_attention(engine, flex.flex_attention)))
        yield


def _modules_without_ftfy() -> list[Any]:
    """Loaded pipeline modules that clean prompts with ftfy while it is not installed: some do not check for it
    (diffusers 0.42, `prompt_clean` of Wan's image-to-video)."""
    loaded = [module for name, module in sys.modules.items() if name.startswith("diffusers.pipelines.")]
    return [module for module in loaded if "basic_clean" in vars(module) and "ftfy" not in vars(module)]


def _ftfy_stand_in(engine: Engine) -> Any:
    """A stand-in for the package, which returns the text unchanged and notes that ftfy is missing."""

    def fix_text(text: str) -> str:
        engine.note("the call needs the package ftfy, which is not installed: pip install ftfy")
        return text

    return SimpleNamespace(fix_text=fix_text)


def _stream_stand_ins(streams: SimBackend) -> list[tuple[Any, str, Any]]:
    """The stand-ins for group offloading's streams: older versions use `torch` itself, those before 0.33 have none."""
    try:
        from diffusers.hooks import group_offloading
    except ImportError:
        return []
    if hasattr(group_offloading, "TorchDeviceBackend"):
        return [(group_offloading, "TorchDeviceBackend", lambda device=None: streams)]
    return [(group_offloading, "torch", _TorchWithStreams(streams))]


def _file_stand_ins(engine: Engine) -> list[tuple[Any, str, Any]]:
    """Stand-ins for safetensors files, which keep shapes and no bytes, in folders that stay empty."""
    import safetensors.torch

    from vramplan.strategies import disk

    kept: dict[str, dict[str, Any]] = {}

    @contextmanager
    def folder(module: torch.nn.Module, *_: Any) -> Iterator[Path]:
        made = tempfile.mkdtemp(prefix="vramplan-")
        weakref.finalize(module, shutil.rmtree, made, True)
        yield Path(made)

    def save(tensors: dict[str, Any], path: str) -> None:
        kept[path] = {key: (tensor.meta, tensor.value) for key, tensor in tensors.items()}

    def load(path: str, device: Any = "cpu") -> dict[str, Any]:
        place = normalize_device(device)
        return {key: engine.new(shape, place, "weights", value) for key, (shape, value) in kept[path].items()}

    return [
        (disk, "own_folder", folder),
        (safetensors.torch, "save_file", save),
        (safetensors.torch, "load_file", load),
    ]


class _TorchWithStreams:
    """`torch`, with the streams of a simulated device."""

    def __init__(self, cuda: SimBackend) -> None:
        self.cuda = cuda
        self.accelerator = SimpleNamespace(current_accelerator=lambda: torch.device("cuda"))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _flex_attention(engine: Engine, original: Callable[..., Any]) -> Callable[..., Any]:
    """A stand-in for flex attention, which diffusers does not compile: it then holds the scores twice, in float32."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(query, SimTensor) or kwargs.get("return_lse") or kwargs.get("return_aux"):
            return original(query, key, value, *args, **kwargs)
        rows = query.numel() // query.shape[-1]
        if query.label.type == "cuda":
            engine.ledger.transient(2 * 4 * rows * key.shape[-2], "workspace")
        engine.ledger.count_kernel(flops=attention_flops(query, key, value), kind=attention_kind(query, None))
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    return attend


@contextmanager
def _hide_warnings() -> Iterator[None]:
    """Context manager: hide the libraries' warnings, which the user sees in the real call."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


@contextmanager
def _default_kernels() -> Iterator[None]:
    """Context manager: use default kernels. The deterministic ones of `interpolate` and `pad` are written in Python."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
