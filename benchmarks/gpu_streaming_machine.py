"""The card of `gpu_streaming.py` or its twin on the CPU, the pipelines, and the copies that weight streaming makes."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import torch
from gpu_accuracy import Models, link

from vramplan.hardware.detect import detect
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.pipeline.describe import describe
from vramplan.simulator.model import SimulatedModel
from vramplan.streaming import backend
from vramplan.units import GIB, MIB
from vramplan.workload import Workload, make_workload

# Small pipelines of the same classes, of examples/make_pipeline.py.
SMALL = {
    "flux.1-dev": "flux-small",
    "stable-diffusion-xl": "sdxl-small",
    "cogvideox-2b": "cogvideox-small",
}


class Device(Protocol):
    """The calls that differ between a card and the CPU."""

    name: str

    def synchronize(self) -> None: ...

    def mark(self, stream: Any = None) -> Any:
        """A point in the work of a stream, by default the current one."""

    def seconds(self, start: Any, end: Any) -> float: ...

    def peak(self, key: str) -> int:
        """Peak bytes `allocated` or `reserved` since `restart`."""

    def restart(self) -> None: ...

    def limit(self, size: int | None) -> None:
        """Let this process allocate so many bytes, as on a smaller card."""

    def page_locked(self) -> dict[str, int]:
        """Page-locked bytes in use and in all, and the microseconds it took to get them so far, as torch counts."""

    def clean(self) -> None:
        """Give unused memory back, page-locked memory included."""

    def link(self) -> Any: ...

    def hardware(self) -> Hardware: ...


class Card:
    name = "cuda:0"

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def mark(self, stream: Any = None) -> Any:
        stream = torch.accelerator.current_stream() if stream is None else stream
        return stream.record_event(torch.Event(self.name, enable_timing=True))

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def peak(self, key: str) -> int:
        return torch.cuda.memory_stats()[f"{key}_bytes.all.peak"]

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def limit(self, size: int | None) -> None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if size is None else size / total)

    def page_locked(self) -> dict[str, int]:
        stats = torch.cuda.host_memory_stats()
        return {key: stats[key] for key in ("active_bytes.current", "allocated_bytes.current", "host_alloc_time.total")}

    def clean(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.accelerator.memory.empty_host_cache()

    def link(self) -> Any:
        return link()

    def hardware(self) -> Hardware:
        return detect()


class Pretend:
    """The CPU in place of a card: nothing that is measured on it means anything."""

    name = "cpu"

    def synchronize(self) -> None:
        return

    def mark(self, stream: Any = None) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return max(end - start, 1e-9)

    def peak(self, key: str) -> int:
        return 64 * MIB

    def restart(self) -> None:
        return

    def limit(self, size: int | None) -> None:
        return

    def page_locked(self) -> dict[str, int]:
        return {}

    def clean(self) -> None:
        gc.collect()

    def link(self) -> Any:
        return {kind: {"best": 1e9} for kind in ("pinned_to_device", "pageable_to_device")}

    def hardware(self) -> Hardware:
        card = Accelerator(kind="cuda", index=0, name="NVIDIA H200", total_bytes=141 * GIB, free_bytes=140 * GIB)
        host = Host(total_bytes=128 * GIB, available_bytes=100 * GIB)
        return Hardware(accelerators=(card,), host=host)


class Small(Models):
    """A small pipeline in place of the full-size one."""

    def load(self, name: str) -> None:
        if name == self.name:
            return
        sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
        from make_pipeline import build

        self.name, self.made = name, build(SMALL[name])
        self.source = SimulatedModel(describe(self.made).spec)

    def describe(self, name: str) -> None:
        self.load(name)

    def pipeline(self) -> Any:
        pipe = type(self.made)(**self.made.components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def workload(self, given: dict[str, int]) -> Workload:
        return make_workload({}, {"height": 64, "width": 64} | ({"num_frames": 9} if "num_frames" in given else {}))


class Full(Models):
    def workload(self, given: dict[str, int]) -> Workload:
        return make_workload(self.defaults, given)


class Masters:
    """The tensors of a pipeline as they were made, put back without copying anything."""

    def __init__(self, pipe: Any) -> None:
        modules = (part for part in pipe.components.values() if isinstance(part, torch.nn.Module))
        self._found = [
            (own, name, tensor, tensor.data)
            for module in modules
            for child in module.modules()
            for own in (child._parameters, child._buffers)
            for name, tensor in own.items()
            if tensor is not None
        ]

    def restore(self) -> None:
        for own, name, tensor, data in self._found:
            tensor.data = data
            own[name] = tensor


def map_file(module: torch.nn.Module, path: Path) -> None:
    """Let the parameters be the mapped pages of a safetensors file of them."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    named = dict(module.named_parameters())
    if not path.exists():
        save_file({name: tensor.data.contiguous() for name, tensor in named.items()}, path)
    with safe_open(path, "pt") as stored:
        for name, tensor in named.items():
            tensor.data = stored.get_tensor(name)


@dataclass
class Copies:
    """The copies of weight streaming: how much was asked for, and when each began and ended on the device."""

    device: Device
    streamed_bytes: int = 0
    locked_bytes: int = 0
    timed: list[tuple[str, int, Any, Any]] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        plain = backend.backend_for
        with patch.object(backend, "backend_for", lambda device: self._watched(plain(device))):
            yield

    def rate(self, kind: str) -> float | None:
        """Bytes per second while something was copied by `copy` (page-locked) or `gather`."""
        found = [(size, start, end) for name, size, start, end in self.timed if name == kind]
        seconds = sum(self.device.seconds(start, end) for _, start, end in found)
        return sum(size for size, *_ in found) / seconds if found else None

    def _watched(self, engine: Any) -> Any:
        side, copier = getattr(engine, "_side", None), getattr(engine, "_copier_side", None)
        lock = engine.page_lock
        engine.copy = self._timing("copy", engine.copy, side, lambda part: part[3])
        # on a card the thread is timed, which reads pageable memory while it copies; without streams it is the call
        name = "_gather" if hasattr(engine, "_gather") else "gather"
        gather = self._timing("gather", getattr(engine, name), copier, lambda part: part[1].nbytes)
        setattr(engine, name, gather)

        def page_lock(size: int, owner: str) -> Any:
            made = lock(size, owner)
            self.locked_bytes += size
            return made

        engine.page_lock = page_lock
        return engine

    def _timing(
        self, kind: str, call: Callable[..., Any], stream: Any, size_of: Callable[[Any], int]
    ) -> Callable[..., Any]:
        def timed(buffer: Any, parts: Any) -> Any:
            parts = list(parts)
            size = sum(map(size_of, parts))
            self.streamed_bytes += size
            start = self.device.mark(stream)
            ticket = call(buffer, parts)
            self.timed.append((kind, size, start, self.device.mark(stream)))
            return ticket

        return timed
