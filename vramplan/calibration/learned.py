"""Stored knowledge of a device: the error of projections, and the size of its driver context."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from vramplan.calibration.published_errors import bundled_error
from vramplan.calibration.records import CallRecord, ProbeRecord
from vramplan.calibration.store import read_store
from vramplan.common.versions import versions
from vramplan.hardware.types import Accelerator
from vramplan.planner.residuals import Basis, ProjectionError, Residual, error_of, raised

# The libraries that decide the memory of given settings; the others change no hook and no kernel.
_DECISIVE = ("torch", "diffusers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """The projection error of a device, from published measurements if this machine has too few of its own, and the
    bytes of its driver context, None if not measured here."""

    error: ProjectionError
    context_bytes: int | None = None


def learned(
    accelerator: Accelerator | None, basis: Basis, pipeline: str | None = None, kinds: Collection[str] = ()
) -> Learned:
    """The projection error and driver context for plans of this basis and of calls of these kinds on this device.

    Enough plans of the same pipeline class measured here (`needed`) decide alone. Fewer, and those of other classes,
    can only raise the error of published measurements: the error of one architecture says little about another's.
    """
    error = bundled_error(basis, kinds)
    if accelerator is None:
        return Learned(error=error)
    records = read_store().records
    calls = [item for item in records if isinstance(item, CallRecord) and _counts(item, accelerator, basis)]
    own = list(_one_for_each_plan([item for item in calls if item.pipeline == pipeline]))
    here = f"on this {accelerator.name}"
    ours, all_of_them = f"measurements of {pipeline} {here}", f"measurements {here}"
    decided = error_of(own, basis, ours)
    if decided is None:
        every = list(_one_for_each_plan(calls))
        bound = error_of(every, basis, all_of_them)
        if bound is None:
            error = raised(error, every, basis, all_of_them)
        elif bound.share > error.share:
            error = bound
        decided = raised(error, own, basis, ours)
    return Learned(error=decided, context_bytes=_context(accelerator, records))


def _counts(item: CallRecord, accelerator: Accelerator, basis: Basis) -> bool:
    """Whether the call was measured on this device, with this basis and software."""
    here = versions()
    return (
        item.device == accelerator.name
        and item.basis == basis
        and all(item.versions.get(name) == here.get(name) for name in _DECISIVE)
        and bool(item.projected.vram_reserved_bytes)
        and item.measured.vram_reserved_bytes is not None
    )


def _one_for_each_plan(calls: list[CallRecord]) -> Iterator[Residual]:
    """The worst residual of each plan: ten repeats of one call are one observation, not ten."""
    plans = {(item.pipeline, item.settings, item.shape): item.plan for item in calls if item.plan}
    found: dict[tuple[str, ...], Residual] = {}
    for item in calls:
        residual = Residual(
            projected_bytes=item.projected.vram_reserved_bytes or 0,
            measured_bytes=item.measured.vram_reserved_bytes or 0,
        )
        words = (item.pipeline, item.settings, item.shape)
        plan = item.plan or plans.get(words)  # an old record has the words alone
        key = (item.pipeline, plan) if plan else words
        worst = found.get(key)
        if worst is None or _ratio(residual) > _ratio(worst):
            found[key] = residual
    yield from found.values()


def _ratio(item: Residual) -> float:
    return item.measured_bytes / item.projected_bytes


def _context(accelerator: Accelerator, records: tuple[object, ...]) -> int | None:
    """The bytes of the driver context when last measured with this driver and torch; None if never."""
    found = [
        item.context_bytes
        for item in records
        if isinstance(item, ProbeRecord)
        and item.device == accelerator.name
        and item.driver == accelerator.driver
        and item.versions.get("torch") == versions().get("torch")
        and item.context_bytes
    ]
    return found[-1] if found else None
