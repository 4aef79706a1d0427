"""Measure a call under an applied plan and store the measurement with the projection."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from vramplan.calibration.peaks import Measured, current_rss_bytes, end_phase, measure_call
from vramplan.calibration.records import CallFacts, CallRecord, Usage
from vramplan.calibration.store import append, read_store
from vramplan.common.progress import Say
from vramplan.common.versions import versions
from vramplan.errors import VramplanError
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.modules import modules_of
from vramplan.planfile.types import Plan, settings_text
from vramplan.runtime.applied import Applied, applied_to
from vramplan.runtime.snapshot import decode_settings


@contextmanager
def calibrating(pipe: Any, *, ram_before_bytes: int | None = None, say: Say = print) -> Iterator[Measured]:
    """Context manager: measure the one call made in the block, and store it for later plans.

    The yielded value is filled when the block ends. `ram_before_bytes` is the RAM that the process held before the
    pipeline was loaded; by default RAM is counted from the start of the block. Nothing is stored if the block fails,
    changes the plan, or runs on another device than the planned one; `say` reports a call that could not be stored.
    The device's peak statistics are reset at the end of each phase.

    Raises:
        VramplanError: vramplan has applied nothing to this pipeline.
    """
    applied = applied_to(pipe)
    if applied is None:
        raise VramplanError("vramplan has applied no plan to this pipeline: there is no projection to hold it against")
    changed = applied.changed
    before = current_rss_bytes() if ram_before_bytes is None else ram_before_bytes
    decoding = _decode_state(pipe)
    with measure_call(applied.device) as measured, _time_steps(pipe, applied.device, measured) as timer:
        yield measured
    measured.ram_bytes = max(0, measured.ram_bytes - before)
    measured.seconds_per_step = timer.seconds
    if not timer.count:
        measured.phases.clear()  # the end of denoising was not seen
    if any(getattr(pipe, name, None) is None for name in applied.plan.settings.placement):
        measured.phases.pop("encode", None)  # the prompt was encoded before, by encoders freed since
    if changed is not None:
        say(f"not kept for later plans: {changed}")
    elif applied_to(pipe) is not applied or _decode_state(pipe) != decoding:
        measured.phases.clear()  # they cover several calls
        say("not kept for later plans: the call ran out of memory, and not all of it ran under the plan")
    elif applied.device == applied.plan.machine.device:
        note = append(record_of(applied, measured))
        if note is not None:
            say(note)


def _decode_state(pipe: Any) -> Any:
    """The decode settings of its components now; a retry after running out of memory changes them."""
    return {name: decode_settings(module) for name, module in modules_of(pipe).items()}


def last_measured(plan: Plan) -> CallRecord | None:
    """Return the last call stored on this machine with the plan's device, settings and workload size, or None."""
    card = plan.machine.accelerator
    device, key, words = card.name if card else "cpu", _key(plan), (settings_text(plan.settings), _workload_shape(plan))
    found = (
        item
        for item in reversed(read_store().records)
        if isinstance(item, CallRecord)
        and (item.device, item.pipeline) == (device, plan.model.class_name)
        and item.is_of(key, *words)
    )
    return next(found, None)


def record_of(applied: Applied, measured: Measured) -> CallRecord:
    """Make the record of a measured call, with the plan's projection."""
    plan = applied.plan
    card = plan.machine.accelerator
    projected = plan.projected
    return CallRecord(
        **measurement_context(card),
        pipeline=plan.model.class_name,
        settings=settings_text(plan.settings),
        shape=_workload_shape(plan),
        plan=_key(plan),
        facts=_facts(plan),
        basis=projected.basis,
        projected=Usage(
            vram_allocated_bytes=projected.vram_allocated_bytes if card else None,
            vram_reserved_bytes=projected.vram_reserved_bytes if card else None,
            ram_bytes=projected.ram_bytes,
            seconds_per_step=projected.seconds_per_step,
            seconds_per_call=projected.seconds_per_call,
        ),
        measured=Usage(
            vram_allocated_bytes=measured.vram_allocated_bytes,
            vram_reserved_bytes=measured.vram_reserved_bytes,
            ram_bytes=measured.ram_bytes,
            seconds_per_step=measured.seconds_per_step,
            seconds_per_call=measured.seconds,
            phases=measured.phases,
        ),
    )


def measurement_context(accelerator: Accelerator | None) -> dict[str, Any]:
    """The time, device and software versions of a measurement; the device's serial number only as a hash."""
    uuid = accelerator.uuid if accelerator else None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": accelerator.name if accelerator else "cpu",
        "card": hashlib.sha256(uuid.encode()).hexdigest()[:16] if uuid else None,
        "driver": accelerator.driver if accelerator else None,
        "versions": versions(),
    }


def _key(plan: Plan) -> str:
    """A hash of the settings and of the size of what is generated, as the plan file spells them."""
    settings = {axis: value for axis, value in asdict(plan.settings).items() if value}
    work = asdict(plan.workload)
    size = [work[name] for name in ("height", "width", "num_frames", "num_images_per_prompt")]
    return hashlib.sha256(json.dumps([settings, size], sort_keys=True).encode()).hexdigest()[:16]


def _facts(plan: Plan) -> CallFacts:
    settings: dict[str, str] = {}
    for axis, value in asdict(plan.settings).items():
        if isinstance(value, dict):
            settings |= {f"{axis}.{name}": text for name, text in value.items()}
        elif value:
            settings[axis] = " ".join(value)
    dtypes = {part.dtype for part in plan.model.components}
    workload = {name: value for name, value in asdict(plan.workload).items() if value is not None}
    return CallFacts(
        fingerprint=plan.model.fingerprint,
        dtype=dtypes.pop() if len(dtypes) == 1 else "",
        settings=settings,
        workload=workload,
    )


def _workload_shape(plan: Plan) -> str:
    work = plan.workload
    return f"{work.width} x {work.height} x {work.num_frames} frames, {work.num_images_per_prompt} per prompt"


class _StepTimer:
    """A timer of `count` denoising steps. `seconds` is the average per step, None for fewer than two."""

    def __init__(self, device: str, measured: Measured) -> None:
        self._device, self._measured = device, measured
        self._wait = _synchronizer(device)
        self._first = self._last = 0.0
        self.count = 0
        self._started = False

    def start(self) -> None:
        end_phase(self._measured, self._device, "denoise" if self._started else "encode")
        self._started = True
        self.count = 0

    def end_step(self) -> None:
        end_phase(self._measured, self._device, "denoise")
        self._wait()
        self._last = time.perf_counter()
        self._first = self._last if not self.count else self._first
        self.count += 1

    @property
    def seconds(self) -> float | None:
        return (self._last - self._first) / (self.count - 1) if self.count > 1 else None


@contextmanager
def _time_steps(pipe: Any, device: str, measured: Measured) -> Iterator[_StepTimer]:
    """Context manager: time the denoising steps of the call in the block, and separate the phases before and after.

    Steps are seen through the progress bar, which every pipeline makes before the first step and updates after each
    one, or iterates over. A callback would be an argument of the user's call, and some pipelines copy the scheduler.
    The first step (warm-up) is left out; waiting for the device keeps the host from running ahead.
    """
    timer = _StepTimer(device, measured)
    progress_bar = getattr(pipe, "progress_bar", None)
    if progress_bar is None:
        yield timer
        return

    def timed_bar(*args: Any, **kwargs: Any) -> Any:
        bar = progress_bar(*args, **kwargs)
        timer.start()
        if bar.iterable is not None:
            bar.iterable = _call_after_each(bar.iterable, timer.end_step)
            return bar
        update = bar.update

        def timed_update(*values: Any) -> Any:
            timer.end_step()
            return update(*values)

        bar.update = timed_update
        return bar

    pipe.__dict__["progress_bar"] = timed_bar
    try:
        yield timer
    finally:
        pipe.__dict__.pop("progress_bar", None)


def _call_after_each(items: Iterable[Any], end_step: Callable[[], None]) -> Iterator[Any]:
    for item in items:
        yield item
        end_step()


def _synchronizer(device: str) -> Callable[[], None]:
    if device.startswith("cpu"):
        return lambda: None
    import torch

    return lambda: torch.accelerator.synchronize(device)
