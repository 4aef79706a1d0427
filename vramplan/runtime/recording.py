"""Measure a call under an applied plan and keep what it took, beside what was projected."""

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
from vramplan.calibration.records import CallRecord, Usage
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
    """Measures the one call that is made in the block, and keeps it for the plans to come.

    The yielded value is filled when the block ends. `ram_before_bytes` is what the process held before the pipeline
    was loaded; RAM is counted from the start of the block where it is left out. Nothing is kept of a block that
    fails, that changes the plan, or that ran on another device than the plan is for; where it could not be kept,
    `say` is told. The device's peak statistics are reset wherever a phase ends.

    Raises:
        VramplanError: vramplan has applied nothing to this pipeline.
    """
    applied = applied_to(pipe)
    if applied is None:
        raise VramplanError("vramplan has applied no plan to this pipeline: there is no projection to hold it against")
    changed = applied.changed
    before = current_rss_bytes() if ram_before_bytes is None else ram_before_bytes
    decoding = _decoding(pipe)
    with measure_call(applied.device) as took, _steps_watched(pipe, applied.device, took) as steps:
        yield took
    took.ram_bytes = max(0, took.ram_bytes - before)
    took.seconds_per_step = steps.seconds
    if not steps.count:
        took.phases.clear()  # where denoising ended was not seen
    if any(getattr(pipe, name, None) is None for name in applied.plan.settings.placement):
        took.phases.pop("encode", None)  # the prompt was encoded before, by encoders that are gone
    if changed is not None:
        say(f"not kept for later plans: {changed}")
    elif applied_to(pipe) is not applied or _decoding(pipe) != decoding:
        took.phases.clear()  # of several calls
        say("not kept for later plans: the call ran out of memory, and not all of it ran under the plan")
    elif applied.device == applied.plan.machine.device:
        note = append(record_of(applied, took))
        if note is not None:
            say(note)


def _decoding(pipe: Any) -> Any:
    """How its components decode now: a decode that runs out of memory is made again in smaller pieces."""
    return {name: decode_settings(module) for name, module in modules_of(pipe).items()}


def last_measured(plan: Plan) -> CallRecord | None:
    """The last call on this plan's device under its settings and of its size that this machine has measured."""
    card = plan.machine.accelerator
    device, key, words = card.name if card else "cpu", _key(plan), (settings_text(plan.settings), _shape(plan))
    found = (
        item
        for item in reversed(read_store().records)
        if isinstance(item, CallRecord)
        and (item.device, item.pipeline) == (device, plan.model.class_name)
        and item.is_of(key, *words)
    )
    return next(found, None)


def record_of(applied: Applied, took: Measured) -> CallRecord:
    """What is kept of a call."""
    plan = applied.plan
    card = plan.machine.accelerator
    projected = plan.projected
    return CallRecord(
        **where(card),
        pipeline=plan.model.class_name,
        settings=settings_text(plan.settings),
        shape=_shape(plan),
        plan=_key(plan),
        basis=projected.basis,
        projected=Usage(
            vram_allocated_bytes=projected.vram_allocated_bytes if card else None,
            vram_reserved_bytes=projected.vram_reserved_bytes if card else None,
            ram_bytes=projected.ram_bytes,
            seconds_per_step=projected.seconds_per_step,
            seconds_per_call=projected.seconds_per_call,
        ),
        measured=Usage(
            vram_allocated_bytes=took.vram_allocated_bytes,
            vram_reserved_bytes=took.vram_reserved_bytes,
            ram_bytes=took.ram_bytes,
            seconds_per_step=took.seconds_per_step,
            seconds_per_call=took.seconds,
            phases=took.phases,
        ),
    )


def where(accelerator: Accelerator | None) -> dict[str, Any]:
    """When, on which device and with which software something was measured; its serial number only as a hash."""
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


def _shape(plan: Plan) -> str:
    work = plan.workload
    return f"{work.width} x {work.height} x {work.num_frames} frames, {work.num_images_per_prompt} per prompt"


class _Steps:
    """When denoising steps ended, `count` of them: `seconds` each took on average, None for fewer than two."""

    def __init__(self, device: str, took: Measured) -> None:
        self._device, self._took = device, took
        self._wait = _waiting(device)
        self._first = self._last = 0.0
        self.count = 0
        self._began = False

    def start(self) -> None:
        end_phase(self._took, self._device, "denoise" if self._began else "encode")
        self._began = True
        self.count = 0

    def ended(self) -> None:
        end_phase(self._took, self._device, "denoise")
        self._wait()
        self._last = time.perf_counter()
        self._first = self._last if not self.count else self._first
        self.count += 1

    @property
    def seconds(self) -> float | None:
        return (self._last - self._first) / (self.count - 1) if self.count > 1 else None


@contextmanager
def _steps_watched(pipe: Any, device: str, took: Measured) -> Iterator[_Steps]:
    """Watches the steps of the call in the block by the progress bar, which every pipeline makes before the first and
    moves at the end of each, or goes through: times them, and tells what is before and after them apart.

    Not by a callback, which is an argument of somebody else's call, and not at the scheduler, which some pipelines
    copy. The first step, which also warms up, is left out; waiting for the device keeps the host from running ahead.
    """
    steps = _Steps(device, took)
    real = getattr(pipe, "progress_bar", None)
    if real is None:
        yield steps
        return

    def watched(*args: Any, **kwargs: Any) -> Any:
        bar = real(*args, **kwargs)
        steps.start()
        if bar.iterable is not None:
            bar.iterable = _each(bar.iterable, steps.ended)
            return bar
        update = bar.update

        def moved(*values: Any) -> Any:
            steps.ended()
            return update(*values)

        bar.update = moved
        return bar

    pipe.__dict__["progress_bar"] = watched
    try:
        yield steps
    finally:
        pipe.__dict__.pop("progress_bar", None)


def _each(items: Iterable[Any], ended: Callable[[], None]) -> Iterator[Any]:
    for item in items:
        yield item
        ended()


def _waiting(device: str) -> Callable[[], None]:
    if device.startswith("cpu"):
        return lambda: None
    import torch

    return lambda: torch.accelerator.synchronize(device)
