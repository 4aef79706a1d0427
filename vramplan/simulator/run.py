"""Run a whole pipeline call on the simulated device and report its memory."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from vramplan.errors import VramplanError
from vramplan.pipeline.dtypes import torch_dtype
from vramplan.pipeline.prompt import Encoded, call_encoded, encode
from vramplan.simulator.allocator import CachingAllocator
from vramplan.simulator.call_tracker import named_modules, track_call
from vramplan.simulator.engine import Engine
from vramplan.simulator.kernels import Kernels
from vramplan.simulator.ledger import Block, Ledger
from vramplan.simulator.memo import Memo
from vramplan.simulator.mode import SimulatedDevices
from vramplan.simulator.parts import Parts
from vramplan.simulator.patches import patched_runtime
from vramplan.simulator.result import simulation_of
from vramplan.simulator.timeline import TimelineRecorder
from vramplan.simulator.trace import CallTrace, Overlay
from vramplan.simulator.tracing import TraceRecorder
from vramplan.simulator.types import DecodedLatents, Simulation, SimulationError
from vramplan.workload import FRAME_ARGUMENTS, Workload

Action = Callable[[Any], None]

# The number of denoising steps simulated: the second one stands for all later ones.
STEPS = 2
_PROMPT = "a photograph of an astronaut riding a horse"
_QUOTING_PROMPT = f'{_PROMPT}, with the words "far away"'


@dataclass(frozen=True, slots=True, kw_only=True)
class First:
    """Components that encode the prompt before others are on the device, and the function that places them."""

    names: Sequence[str]
    place: Action


@contextmanager
def simulated_devices(engine: Engine) -> Iterator[None]:
    """Context manager: torch, diffusers and accelerate work with simulated tensors inside."""
    with patched_runtime(engine), SimulatedDevices(engine), torch.no_grad():
        yield


def run_simulation(
    parts: Parts,
    workload: Workload,
    place: Callable[[Any], None],
    *,
    first: First | None = None,
    capacity_bytes: int | None = None,
    expandable: bool = False,
    kernels: Kernels | None = None,
    memo: Memo | None = None,
    timeline: bool = False,
) -> Simulation:
    """Build the pipeline from simulated tensors, apply the settings with `place`, and run one call of the workload.

    With `first`, those components encode the prompt before that, and are dropped. Exceeding `capacity_bytes` is a
    result, not an error. `expandable` is the allocator's setting of that name; `memo` holds the recordings of other
    simulations of these parts with these kernels. `timeline` adds the memory over the call.

    Raises:
        SimulationError: the call needs something that a pipeline without weights cannot give.
    """
    evaluations = [0, 0]
    call = _call_of(workload, evaluations)
    allocator = CachingAllocator(capacity_bytes=capacity_bytes, expandable=expandable)
    stages = [(place, call)] if first is None else _encode_first(first, workload, place)
    recorder = TimelineRecorder() if timeline else None
    ledger = _ledger(allocator, recorder.note if recorder else None)
    found = simulate_stages(parts, stages, ledger, kernels or Kernels(), memo or Memo())
    found = replace(found, evaluations=evaluations[0], call_evaluations=evaluations[1])
    return replace(found, timeline=recorder.timeline()) if recorder else found


def _call_of(workload: Workload, evaluations: list[int]) -> Action:
    """The call of the workload, which notes how many evaluations of the denoiser it makes, and a whole one would."""

    def call(pipe: Any) -> None:
        pipe(**call_inputs(pipe, workload))
        evaluations[:] = (evaluations_of(pipe, steps) for steps in (STEPS, workload.num_inference_steps))

    return call


def record_call(
    parts: Parts,
    workload: Workload,
    place: Callable[[Any], None],
    *,
    expandable: bool,
    kernels: Kernels,
    memo: Memo,
    laid_over: Collection[str] = (),
) -> tuple[Simulation, CallTrace, Overlay]:
    """Simulate a call as `run_simulation` does without a capacity, and record its memory.

    Weights of components `laid_over`, which `place` may give hooks, are recorded apart from all the rest. The other
    components are resident.

    Raises:
        SimulationError: the call needs something that a pipeline without weights cannot give.
    """
    ledger = _ledger(CachingAllocator(expandable=expandable))
    recorder = TraceRecorder(ledger, laid_over)
    ledger.recorders.append(recorder)

    def place_marked(pipe: Any) -> None:
        place(pipe)
        recorder.mark(pipe)

    evaluations = [0, 0]
    plain = _call_of(workload, evaluations)

    def call(pipe: Any) -> None:
        plain(pipe)
        ledger.recorders.remove(recorder)  # what comes next is the end of the pipeline, and not of its call

    found = simulate_stages(parts, [(place_marked, call)], ledger, kernels, memo)
    found = replace(found, evaluations=evaluations[0], call_evaluations=evaluations[1])
    return found, recorder.trace(STEPS), recorder.overlay()


def _ledger(allocator: CachingAllocator, observe: Callable[[Ledger, Block, int], None] | None = None) -> Ledger:
    """A ledger whose full device raises torch's own error, which libraries may catch."""
    return Ledger(allocator, observe, out_of_memory=torch.OutOfMemoryError)


def evaluations_of(pipe: Any, steps: int) -> int:
    """Count the evaluations of the denoiser that the pipeline's scheduler makes in so many steps, by default one each.

    A scheduler of second order (Heun, KDPM2) has nearly two timesteps for each step, PNDM one more than steps.
    """
    scheduler: Any = copy.deepcopy(getattr(pipe, "scheduler", None))
    try:
        scheduler.set_timesteps(steps)
        return len(scheduler.timesteps)
    except Exception:  # none, or one that needs more than the number of steps, as those of flow matching do
        return steps


def _encode_first(first: First, workload: Workload, place: Action) -> list[tuple[Action, Action]]:
    """The two stages: encode the prompt with only the encoders on the device, then run the call without them."""
    encoded: list[Encoded] = []

    def begin(pipe: Any) -> None:
        encoded.append(encode(pipe, call_inputs(pipe, workload), first.names))

    def drop_and_place(pipe: Any) -> None:
        for name in first.names:
            setattr(pipe, name, None)
        gc.collect()
        place(pipe)

    return [(first.place, begin), (drop_and_place, lambda pipe: call_encoded(pipe, encoded[0]))]


def run_encode(parts: Parts, arguments: Callable[[Any], Mapping[str, Any]], names: Sequence[str]) -> Encoded:
    """Simulate encoding the prompt in a call with these arguments; return its inputs and results.

    Raises:
        SimulationError: the pipeline needs something that one without weights cannot give.
        EncodeError: its prompt cannot be encoded apart from the rest of the call.
    """
    ledger = _ledger(CachingAllocator())
    engine = Engine(ledger, Kernels())
    with simulated_devices(engine):
        try:
            pipe = parts.assemble(engine)
            pipe.set_progress_bar_config(disable=True)
            for name in names:
                pipe.components[name].to("cuda:0")
            return encode(pipe, arguments(pipe), names)
        except VramplanError:
            raise
        except Exception as error:
            raise SimulationError(_stop_message(error, ledger)) from error
        finally:
            engine.kernels.release()


def run_decode(
    parts: Parts,
    latents: Sequence[DecodedLatents],
    place: Callable[[Any], None],
    *,
    kernels: Kernels | None = None,
    memo: Memo | None = None,
) -> Simulation:
    """Simulate only the end of a call: the VAEs decode latents of these shapes.

    Raises:
        SimulationError: a VAE needs something that latents without values cannot give.
    """

    def call(pipe: Any) -> None:
        allocate_cublas_workspace()
        for item in latents:
            vae, dtype = pipe.components[item.component], torch_dtype(item.dtype)
            if dtype != vae.dtype:
                vae.to(dtype)  # the pipeline does so before it decodes latents of another dtype
            pipe.vae = vae
            given = torch.empty_strided(item.shape, item.stride, dtype=dtype, device="cuda:0")
            pipe.decode_latents(given, item.frames)

    only = Parts(cls=ComponentsOnly, modules={item.component: parts.modules[item.component] for item in latents})
    return simulate_call(only, place, call, CachingAllocator(), kernels or Kernels(), memo)


def decode_all(vae: Any, latents: torch.Tensor, frames: int | None, chunk: int | None = None) -> None:
    """Decode latents; with `frames`, that many at once, or `chunk` frames at a time."""
    if frames is None:
        vae.decode(latents, return_dict=False)
        return
    decoded = [vae.decode(part, num_frames=len(part)).sample for part in torch.split(latents, chunk or frames)]
    torch.cat(decoded)


def allocate_cublas_workspace() -> None:
    """Make a matrix product, so that its workspace stays allocated as after the earlier part of a whole call."""
    one = torch.ones((1, 1), device="cuda:0")
    one @ one


class ComponentsOnly:
    """A minimal pipeline, for simulating some components alone."""

    def __init__(self, **components: Any) -> None:
        self.components = components
        self.vae: Any = None

    def decode_latents(self, latents: torch.Tensor, num_frames: int | None, decode_chunk_size: Any = None) -> None:
        """Decode with `vae`, the current one, as video pipelines do."""
        decode_all(self.vae, latents, num_frames, decode_chunk_size)

    def set_progress_bar_config(self, **_: Any) -> None:
        """Do nothing: there is no progress bar."""

    def to(self, device: str) -> None:
        """Move every component."""
        for module in self.components.values():
            module.to(device)


def simulate_call(
    parts: Parts,
    place: Callable[[Any], None],
    call: Callable[[Any], None],
    allocator: CachingAllocator,
    kernels: Kernels,
    memo: Memo | None = None,
) -> Simulation:
    """Simulate `call` on a pipeline of these parts, after `place` has applied its settings.

    Raises:
        SimulationError: the call needs something that a pipeline without weights cannot give.
    """
    return simulate_stages(parts, [(place, call)], _ledger(allocator), kernels, memo or Memo())


def simulate_stages(
    parts: Parts, stages: Sequence[tuple[Action, Action]], ledger: Ledger, kernels: Kernels, memo: Memo
) -> Simulation:
    """Simulate a call in stages, each a pair of functions: place, then call. Raises SimulationError."""
    start = time.perf_counter()
    engine = Engine(ledger, kernels)
    stopped: str | None = None
    decoded: list[DecodedLatents] = []
    with simulated_devices(engine):
        try:
            pipe = parts.assemble(engine)
            pipe.set_progress_bar_config(disable=True)
            memo.attach(named_modules(pipe), engine)
            for stage, (place, call) in enumerate(stages):
                ledger.start_loading()
                place(pipe)
                with track_call(pipe, ledger) as decoded:
                    ledger.phase = "denoise" if stage else ledger.phase  # the first stage has encoded the prompt
                    call(pipe)
        except torch.OutOfMemoryError as error:
            stopped = str(error)
        except Exception as error:
            raise SimulationError(_stop_message(error, ledger)) from error
        finally:
            engine.kernels.release()
        seconds = time.perf_counter() - start
        found = simulation_of(ledger, stopped, steps=STEPS, seconds=seconds)
        return replace(found, decoded=tuple(decoded), notes=tuple(engine.notes))


def call_inputs(pipe: Any, workload: Workload) -> dict[str, Any]:
    """The arguments for a call of the workload (text, pictures, sizes), limited to those the pipeline takes."""
    takes = inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters
    batch = workload.num_images_per_prompt
    wanted: dict[str, Any] = {
        "prompt": _QUOTING_PROMPT if _reads_quotes(pipe) else _PROMPT,
        "height": workload.height,
        "width": workload.width,
        "num_images_per_prompt": batch,
        "num_videos_per_prompt": batch,
        "num_waveforms_per_prompt": batch,
        "batch_size": batch,
        "class_labels": [0] * batch,
        "guidance_scale": workload.guidance_scale,
        "output_type": "pt",
    }
    wanted |= dict.fromkeys(FRAME_ARGUMENTS, workload.num_frames if workload.num_frames > 1 else None)
    wanted |= {name: STEPS for name in takes if name.endswith("num_inference_steps")}  # a prior's steps too
    if "strength" in takes and 0 < (strength := takes["strength"].default or 0) < 1:
        wanted["num_inference_steps"] = math.ceil(STEPS / strength)  # the pipeline runs only this share of them
    wanted |= _picture_inputs(takes, workload)
    return {name: value for name, value in wanted.items() if value is not None and name in takes}


def _reads_quotes(pipe: Any) -> bool:
    """Whether a text encoder runs for quoted text alone (diffusers 0.42: HunyuanVideo 1.5, HunyuanImage, GLM-Image)."""
    places = [place for cls in type(pipe).__mro__ for place in (cls, sys.modules[cls.__module__])]
    return any("glyph_text" in name for place in places for name in vars(place))


def _picture_inputs(takes: Mapping[str, inspect.Parameter], workload: Workload) -> dict[str, Any]:
    """Grey pictures for the image and video arguments that the pipeline takes."""
    from PIL import Image

    picture = Image.new("RGB", (workload.width, workload.height), (127, 127, 127))
    mask = Image.new("L", (workload.width, workload.height), 255)
    given: dict[str, Any] = {"image": picture, "control_image": picture, "mask_image": mask, "source_image": picture}
    video = [picture] * max(1, workload.num_frames)
    given |= dict.fromkeys(("video", "control_video", "conditioning_frames", "pose_video", "face_video"), video)
    return {name: value for name, value in given.items() if name in takes}


def _stop_message(error: Exception, ledger: Ledger) -> str:
    module = ledger.modules[-1] if ledger.modules else "the pipeline's own code"
    return (
        f"the call stopped in {module} after {ledger.operation}: {type(error).__name__}: {' '.join(str(error).split())}"
    )
