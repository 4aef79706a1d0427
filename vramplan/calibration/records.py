"""Records of the store, one per line, and the strict checks of a line, as the file may have been edited."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

from vramplan.calibration.peaks import Peak

# 1 had no phases, 2 no plan, 3 no copies back to pageable memory, 4 no launches, attention, sizes of products and disk,
# 5 no facts of a call
SCHEMA = 6
_LARGEST, _LONGEST = 1 << 62, 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Peaks in bytes and times in seconds; None for values that a device or pipeline does not report.

    `phases` are the peaks of `encode`, `denoise` and `decode`, if they were separated.
    """

    vram_allocated_bytes: int | None
    vram_reserved_bytes: int | None
    ram_bytes: int
    seconds_per_step: float | None
    seconds_per_call: float
    phases: Mapping[str, Peak] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFacts:
    """A call as data, to simulate it elsewhere: settings by axis and component (`placement.transformer`; those of the
    decode, separated by spaces, as `decode`), the workload, the dtype common to all components, if any, and the
    plan's fingerprint of the pipeline."""

    fingerprint: str
    dtype: str
    settings: Mapping[str, str]
    workload: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecord:
    """A call under an applied plan: projected and measured usage.

    `device` is its name by the driver, `card` a hash of its serial number. `settings` and `shape` (the
    workload) are for people to read; `plan` is a hash of both as data, empty in older records, which have no `facts`.
    """

    time: str
    device: str
    card: str | None
    driver: str | None
    versions: Mapping[str, str]
    pipeline: str
    settings: str
    shape: str
    basis: str
    projected: Usage
    measured: Usage
    plan: str = ""
    facts: CallFacts | None = None

    def is_of(self, plan: str, settings: str, shape: str) -> bool:
        """Whether the call ran under this plan: by its hash, by its words where the record has no other."""
        return self.plan == plan if self.plan else (self.settings, self.shape) == (settings, shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRecord:
    """Results of `vramplan calibrate` for a device, in bytes, bytes per second, operations per second and seconds.

    Products are by the side of their matrices, `half_flops_per_s` is of the fastest; attention is by head size.
    """

    time: str
    device: str
    card: str | None
    driver: str | None
    versions: Mapping[str, str]
    context_bytes: int | None = None
    pinned_to_device_bytes_per_s: float | None = None
    pageable_to_device_bytes_per_s: float | None = None
    device_to_pinned_bytes_per_s: float | None = None
    device_to_pageable_bytes_per_s: float | None = None
    memory_bytes_per_s: float | None = None
    half_flops_per_s: float | None = None
    product_flops_per_s: Mapping[str, float] = field(default_factory=dict)
    attention_flops_per_s: Mapping[str, float] = field(default_factory=dict)
    launch_seconds: float | None = None
    disk_bytes_per_s: float | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


Record = CallRecord | ProbeRecord
_KINDS: dict[str, type[Record]] = {"call": CallRecord, "probe": ProbeRecord}


def to_line(record: Record) -> str:
    """Format the record as one line of JSON."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(record, cls))
    return json.dumps({"schema": SCHEMA, "kind": kind} | asdict(record), allow_nan=False)


def from_line(line: str) -> Record | None:
    """Parse the record in a line; None if a later version wrote it.

    Raises:
        ValueError: not a record.
    """
    content = json.loads(line, parse_constant=_no_number)
    if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
        raise ValueError("not a record")
    if content["schema"] > SCHEMA:
        return None
    values = {key: value for key, value in content.items() if key not in ("schema", "kind")}
    cls = _KINDS.get(str(content.get("kind")))
    if cls is None:
        raise ValueError("of no known kind")
    return typing.cast("Record", _built(cls, values))


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _built(cls: Any, content: Any) -> Any:
    """Build a dataclass from a mapping. Without pydantic, whose import takes longer than `vramplan detect` may."""
    if not isinstance(content, dict) or content.keys() - {item.name for item in fields(cls)}:
        raise ValueError(f"not a {cls.__name__}")
    hints = _hints(cls)
    try:
        return cls(**{name: _checked(value, hints[name]) for name, value in content.items()})
    except TypeError as error:
        raise ValueError(str(error)) from None


@cache
def _hints(cls: Any) -> Mapping[str, Any]:
    return typing.get_type_hints(cls)


def _checked(value: Any, hint: Any) -> Any:
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in choices:
        return None
    wanted = choices[0]
    if is_dataclass(wanted):
        return _built(typing.cast("type[Any]", wanted), value)
    if wanted is str and isinstance(value, str) and len(value) <= _LONGEST:
        return value
    if wanted in (int, float) and _is_size(value, wanted):
        return wanted(value)
    if typing.get_origin(wanted) is not None and isinstance(value, dict):
        return {str(key): _checked(item, typing.get_args(wanted)[1]) for key, item in value.items()}
    raise ValueError(f"{value!r:.60} is no {hint}")


def _is_size(value: Any, wanted: type) -> bool:
    """Whether the value is a finite number of the wanted type, from 0 and below `_LARGEST`."""
    if isinstance(value, bool) or not isinstance(value, int if wanted is int else int | float):
        return False
    return 0 <= value < _LARGEST and math.isfinite(value)
