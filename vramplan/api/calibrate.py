"""`vramplan calibrate`: measure a device and store the measurements for later plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vramplan.api.machine import choose_machine
from vramplan.calibration.context import context_bytes
from vramplan.calibration.export import Known, exported
from vramplan.calibration.measured_rates import probe_fields
from vramplan.calibration.peaks import Measured
from vramplan.calibration.records import CallRecord, ProbeRecord
from vramplan.calibration.store import append, read_store, store_folder
from vramplan.common.progress import Say
from vramplan.errors import UsageError, VramplanError
from vramplan.hardware.detect import detect
from vramplan.hardware.measurements import measure_device, measure_disk
from vramplan.hardware.types import Accelerator, Hardware
from vramplan.pipeline.bundled import spec_from_profile
from vramplan.planfile.types import Plan, fingerprint
from vramplan.profiles.catalogue import bundled_device, bundled_pipelines
from vramplan.runtime.recording import measurement_context

Report = Callable[[Plan, Measured], None]  # called with each plan of the small pipeline and its measured call


def calibrate(device: str | None = None, *, pipeline: bool = True, say: Say = print, report: Report) -> ProbeRecord:
    """Measure a device of this machine, and the calls of a small pipeline; store and return the measurements.

    Raises:
        VramplanError: this machine has no accelerator, or torch cannot use it.
        UsageError: the device is not one of this machine's, or storing measurements is switched off.
    """
    if store_folder() is None:
        raise UsageError("VRAMPLAN_CALIBRATION=0 keeps nothing: unset it, or name a folder")
    hardware, accelerator = choose_machine(device)
    if accelerator is None:
        raise VramplanError("nothing to calibrate: no accelerator was found, and a plan for the CPU keeps no margin")
    if accelerator.name not in {item.name for item in detect().accelerators}:
        raise UsageError(
            f"device {device}: {accelerator.name} is not in this machine, and only what is here is measured"
        )
    _check_torch(accelerator)
    record = run_probes(hardware, accelerator, say=say)
    note = append(record)
    if note is not None:
        raise VramplanError(note)
    if pipeline:
        _run_sample(accelerator, say, report)
    return record


def export_measurements() -> dict[str, Any]:
    """What was measured on this machine, as rows for the benchmarks of vramplan: no names of users and machines, no
    paths, no hub ids. A pipeline is named by the bundled profile that it is equal to."""
    return exported(read_store().records, Known(model=_bundled_model, device=bundled_device))


def _bundled_model(call: CallRecord) -> tuple[str, str] | None:
    """The bundled profile with the same components in the same dtypes, and its own dtype."""
    facts = call.facts
    if facts is None:
        return None
    for profile in bundled_pipelines(call.pipeline):
        if fingerprint(spec_from_profile(profile, dtype=facts.dtype or None)) == facts.fingerprint:
            return profile.name, profile.dtype
    return None


def run_probes(hardware: Hardware, accelerator: Accelerator, *, say: Say) -> ProbeRecord:
    """Measure all there is to measure; what fails is left out, with the reason as a note."""
    notes: dict[str, str] = {}
    # The context first: it cannot be separated any more once torch holds memory.
    say("measuring the driver context")
    context = None
    try:
        context = context_bytes(accelerator)
    except RuntimeError as error:  # out of memory, or a kernel that this device does not have
        notes["the driver context"] = " ".join(str(error).split())[:300]
    measured = list(measure_device(accelerator, notes, say))
    if not hardware.host.disk_in_memory:
        say("measuring the disk")
        measured += measure_disk(notes)
    return ProbeRecord(**measurement_context(accelerator), context_bytes=context, **probe_fields(measured), notes=notes)


def _check_torch(accelerator: Accelerator) -> None:
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type != accelerator.device.partition(":")[0]:
        raise VramplanError(f"{accelerator.name} is here, but this torch ({torch.__version__}) cannot use it")


def _run_sample(accelerator: Accelerator, say: Say, report: Report) -> None:
    from vramplan.api.calibrate_sample import MODEL, measured_plans, sample_pipeline

    say(f"making {MODEL} with random weights")
    pipe = sample_pipeline(accelerator.device)
    for plan, measured in measured_plans(pipe, accelerator.device):
        if plan is None or isinstance(measured, str):
            say(f"not measured: {measured}")
        else:
            report(plan, measured)
