"""What was measured on this machine as rows that the benchmarks of this project read, without names or paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vramplan.calibration.records import CallFacts, CallRecord, ProbeRecord, Record
from vramplan.strategies.settings import parse_placement
from vramplan.units import GIB

ABOUT = (
    "Measured by vramplan calibrate and by calls under plans; read by benchmarks/accuracy.py and benchmarks/times.py."
)
# The libraries that a peak is simulated with, in the order of their installation.
_LIBRARIES = ("diffusers", "transformers", "accelerate")
# Of a probe: the card by a hash of its serial number, and messages of errors, which can hold paths.
_KEPT_BACK = ("card", "notes", "time")
# The axes that a row has a key for. A call under other settings cannot be simulated from a row.
_AXES = ("placement", "decode", "weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Bundled profiles of what was measured: the pipeline with the dtype that it is published in, and the device."""

    model: Callable[[CallRecord], tuple[str, str] | None]
    device: Callable[[str], str | None]


def exported(records: Iterable[Record], known: Known) -> dict[str, Any]:
    """The content of a file of rows: calls by their last measurement, probes by the last of each device.

    `left_out` counts the calls that no row can be made of, by reason.
    """
    calls: dict[tuple[str, ...], CallRecord] = {}
    probes: dict[str, ProbeRecord] = {}
    for item in records:
        if isinstance(item, ProbeRecord):
            probes[item.device] = item
        else:
            pipeline = item.facts.fingerprint if item.facts else item.pipeline
            calls[item.device, pipeline, item.plan or item.settings + item.shape, *_pins(item.versions)] = item
    libraries: dict[str, list[str]] = {}
    rows: list[dict[str, Any]] = []
    left_out: dict[str, int] = {}
    for call in calls.values():
        made = _rows(call, known, libraries)
        if isinstance(made, str):
            left_out[made] = left_out.get(made, 0) + 1
        else:
            rows += made
    return {
        "about": ABOUT,
        "libraries": libraries,
        "rows": rows,
        "left_out": left_out,
        "probes": [_probe(item, known) for item in probes.values()],
    }


def _rows(call: CallRecord, known: Known, libraries: dict[str, list[str]]) -> list[dict[str, Any]] | str:
    """A row of the reserved peak and the seconds, and one of the allocated peak; a reason if there can be none."""
    facts, usage = call.facts, call.measured
    if usage.vram_reserved_bytes is None or usage.vram_allocated_bytes is None:
        return "no memory of a device was measured"
    if facts is None:
        return "measured before calls were kept with their settings"
    reason = _unreadable(facts)
    if reason is not None:
        return reason
    model = known.model(call)
    if model is None:
        return "no bundled profile is of this pipeline"
    pins = _pins(call.versions)
    libraries[" ".join(pins)] = list(pins)
    name, dtype = model
    shared = {
        "model": name,
        "with": " ".join(pins),
        "loads": facts.dtype or dtype,
        "dtype": facts.dtype or dtype,
        **_settings(facts),
        "workload": {part: int(value) if value == int(value) else value for part, value in facts.workload.items()},
        "gpu": call.device,
        "card": known.device(call.device),
        "driver": call.driver,
        "versions": dict(call.versions),
        "source": f"measured by vramplan on {call.time[:10]}",
    }
    key = f"{name}-{call.plan[:8]}"
    per, seconds = ("step", usage.seconds_per_step) if usage.seconds_per_step else ("call", usage.seconds_per_call)
    size = " x ".join(f"{facts.workload[part]:g}" for part in sorted(facts.workload))
    timed = {"seconds": seconds, "per": per, "confidence": "measured", "pair_group": f"{call.device} {name} {size}"}
    reserved = {"id": key, "metric": "reserved", "gib": usage.vram_reserved_bytes / GIB, **shared}
    allocated = {"id": f"{key}-allocated", "metric": "allocated", "gib": usage.vram_allocated_bytes / GIB, **shared}
    return [reserved | timed | {"strategy": _strategy(facts)}, allocated]


def _unreadable(facts: CallFacts) -> str | None:
    """The reason why no row can say how the call was made."""
    others = {key.partition(".")[0] for key in facts.settings}.difference(_AXES)
    if others:
        return f"settings of {' and '.join(sorted(others))}"
    if any(text.startswith("gguf") for text in facts.settings.values()):
        return "weights from a file"
    if any(parse_placement(text).freed for key, text in facts.settings.items() if key.startswith("placement.")):
        return "encoders dropped after encoding"
    return None


def _settings(facts: CallFacts) -> dict[str, Any]:
    """The settings under the keys of a row: one placement for all components where it is the same."""
    by_axis: dict[str, dict[str, str]] = {axis: {} for axis in _AXES}
    for key, text in facts.settings.items():
        axis, _, component = key.partition(".")
        by_axis[axis][component] = text
    placed = by_axis["placement"]
    same = set(placed.values())
    found: dict[str, Any] = {"placement": same.pop() if len(same) == 1 else placed}
    if by_axis["weights"]:
        found["weights"] = by_axis["weights"]
    return found | ({"decode": by_axis["decode"][""].split()} if by_axis["decode"] else {})


def _strategy(facts: CallFacts) -> str:
    """The kinds of placement but residence, as one word for a table."""
    names = {text.partition(":")[0] for key, text in facts.settings.items() if key.startswith("placement.")}
    return "+".join(sorted(names - {"resident"})) or "resident"


def _probe(probe: ProbeRecord, known: Known) -> dict[str, Any]:
    values = ((name, value) for name, value in asdict(probe).items() if name not in _KEPT_BACK)
    found = {name: value for name, value in values if value not in (None, {})}
    return {"profile": known.device(probe.device), "date": probe.time[:10], **found}


def _pins(versions: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{name}=={versions[name]}" for name in _LIBRARIES if name in versions)
