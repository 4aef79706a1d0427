"""A machine as text for people, as JSON for programs, and as a block for a bug report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vramplan.hardware.types import Accelerator, Budget, Deduction, Hardware, Host, Measurement
from vramplan.units import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vramplan.calibration.records import ProbeRecord

CALIBRATE_SCHEMA_VERSION = 1
DETECT_SCHEMA_VERSION = 1
_INDENT = " " * 14


def hardware_dict(hardware: Hardware, budget: Budget | None) -> dict[str, Any]:
    """The machine and its budget: an object for programs and machine files.

    The budget is None if no memory is left to use.
    """
    usable = None if budget is None else asdict(budget)
    return {"schema_version": DETECT_SCHEMA_VERSION, **asdict(hardware), "budget": usable}


def text_of(hardware: Hardware, budget: Budget | None = None) -> str:
    """The machine for a person, as plain text."""
    from vramplan.view.terminal import as_text

    return as_text(hardware_view(hardware, budget))


def html_of(hardware: Hardware) -> str:
    """The machine for a notebook."""
    from vramplan.view.terminal import as_html

    return as_html(hardware_view(hardware, None))


def hardware_view(hardware: Hardware, budget: Budget | None) -> RenderableType:
    """The machine for a person: each memory, and the budget with its deductions and their reasons."""
    from vramplan.view.bars import budget_bar
    from vramplan.view.terminal import hang, stack

    lines = []
    for accelerator in hardware.accelerators:
        lines.append(_accelerator_line(accelerator))
        lines += [f"{_INDENT}{fact}" for fact in _facts(accelerator)]
    if not hardware.accelerators:
        lines.append("accelerator   none found: plans are for the CPU")
    views = [hang(line, len(_INDENT)) for line in (*lines, *_host_lines(hardware.host))]
    if budget is not None:
        views += ["", "may be used"]
        if budget.vram_bytes is not None:
            vram = [item for item in budget.deductions if item.memory == "vram"]
            views += [hang(line, 8) for line in _budget_lines("VRAM", budget.vram_bytes, vram)]
        ram = [item for item in budget.deductions if item.memory == "ram"]
        views += [hang(line, 8) for line in _budget_lines("RAM", budget.ram_bytes, ram)]
        if budget.disk_bytes is not None:
            views += [hang(line, 8) for line in _disk_budget(hardware.host, budget.disk_bytes)]
        views += ["", budget_bar(budget)] if budget.vram_bytes is not None else []
    views += [hang(f"note: {note}", 6, "yellow") for note in hardware.notes]
    return stack(views)


def hardware_markdown(hardware: Hardware, budget: Budget | None) -> str:
    """The machine as a block for a bug report, without names of the machine and its owner and device identifiers."""
    from vramplan._version import __version__
    from vramplan.view.redact import redact

    body = redact(text_of(hardware, budget), [device.uuid for device in hardware.accelerators if device.uuid])
    return f"<details><summary>vramplan {__version__} detect</summary>\n\n```text\n{body}\n```\n\n</details>"


def _accelerator_line(accelerator: Accelerator) -> str:
    free = "free unknown" if accelerator.free_bytes is None else f"{format_bytes(accelerator.free_bytes)} free"
    shared = ", shared with the CPU" if accelerator.unified else ""
    shared = ", memory of its own, open to the CPU" if accelerator.coherent else shared
    return f"{accelerator.device:<13} {accelerator.name}: {format_bytes(accelerator.total_bytes)}, {free}{shared}"


def _facts(device: Accelerator) -> Iterator[str]:
    """The device's known facts other than its memory, one line each."""
    if not device.identified:
        yield "unidentified: one of several devices, of which this is what they have in common"
    about = [device.part, device.architecture, device.driver and f"driver {device.driver}", device.uuid]
    if any(about):
        yield ", ".join(fact for fact in about if fact)
    if device.native:
        yield f"computes in {', '.join(device.native)}"
    if device.free_readings:
        sources = ", ".join(f"{item.source} {format_bytes(item.free_bytes)}" for item in device.free_readings)
        yield f"free by {sources} ({device.free_reason})"
    if device.own is not None:
        yield (
            f"this process has {format_bytes(device.own.allocated_bytes)} in tensors and "
            f"{format_bytes(device.own.cached_bytes)} in torch's cache, "
            f"and may use {device.own.fraction:.0%} of the total"
        )
    if device.others:
        yield f"used by {', '.join(_process(item) for item in device.others)}"
    if device.display:
        yield "drives a display"
    yield from _link_facts(device)
    yield from map(_measurement, device.measured)


def _process(item: Any) -> str:
    used = "memory not said" if item.used_bytes is None else format_bytes(item.used_bytes)
    return f"{item.name or 'a program'} ({used})"


def _link_facts(device: Accelerator) -> Iterator[str]:
    link = device.pcie
    if link is not None:
        now = f"PCIe {link.generation or '?'} x{link.width or '?'} now"
        most = f"at most {link.max_generation or '?'} x{link.max_width or '?'}"
        yield f"{now}, {most}{_link_reasons(link.generation, link.max_generation, link.width, link.max_width)}"
    if device.link_bytes_per_s is not None:
        yield f"copies to it at most at {device.link_bytes_per_s / 1e9:.3g} GB/s"
    for peer in device.peers:
        yield f"{peer.count} {peer.link} link(s) to {peer.to}"


def _link_reasons(generation: int | None, most: int | None, width: int | None, widest: int | None) -> str:
    reasons = []
    if generation and most and generation < most:
        reasons.append("an idle link slows down and speeds up under load")
    if width and widest and width < widest:
        reasons.append("the slot gives fewer lanes than the card takes")
    return f": {'; '.join(reasons)}" if reasons else ""


def _host_lines(host: Host) -> Iterator[str]:
    if host.system is not None:
        yield f"system        {host.system}"
    yield f"RAM           {format_bytes(host.total_bytes)}, {format_bytes(host.available_bytes)} available"
    if host.limit_bytes is not None:
        yield f"RAM limit     {format_bytes(host.limit_bytes)} ({host.limit_source})"
    if host.swap_total_bytes is not None:
        free = "" if host.swap_free_bytes is None else f", {format_bytes(host.swap_free_bytes)} free"
        yield (
            f"swap          {format_bytes(host.swap_total_bytes)}{free}"
            if host.swap_total_bytes
            else "swap          none"
        )
    if host.pinned_limit_bytes is not None:
        yield f"pinned RAM    at most {format_bytes(host.pinned_limit_bytes)} ({host.pinned_source})"
    if host.cores is not None:
        yield f"cores         {host.cores}{f' ({host.cores_source})' if host.cores_source else ''}"
    if host.disk_free_bytes is not None:
        yield f"disk          {format_bytes(host.disk_free_bytes)} free where weights may be offloaded to{_disk(host)}"
    for item in host.measured:
        yield f"{_INDENT}{_measurement(item)}"


def _disk(host: Host) -> str:
    kind = {None: None, True: "turning", False: "not turning"}[host.disk_rotational]
    words = [host.disk_filesystem, "in RAM" if host.disk_in_memory else kind]
    return f" ({', '.join(word for word in words if word)})" if any(words) else ""


def _measurement(item: Measurement) -> str:
    scale, unit = {"bytes/s": (1e9, "GB/s"), "operations/s": (1e12, "Tflop/s"), "s": (1e-6, "us")}[item.unit]
    median, least, most = (f"{value / scale:.3g}" for value in (item.median, item.least, item.most))
    return f"measured {item.what.replace('_', ' ')}: {median} {unit} ({least} to {most} in {item.runs} runs)"


def _disk_budget(host: Host, count: int) -> Iterator[str]:
    yield f"  {'disk':<5} {format_bytes(count):>10}"
    if host.disk_in_memory:
        yield "        nothing: what is offloaded there stays in RAM"
    elif host.disk_free_bytes is not None:
        kept = format_bytes(host.disk_free_bytes - count)
        yield f"        less {kept} reserve: kept free on the disk that weights may be offloaded to"


def _budget_lines(memory: str, count: int, deductions: Sequence[Deduction]) -> Iterable[str]:
    yield f"  {memory:<5} {format_bytes(count):>10}"
    for item in deductions:
        sign = "less" if item.size_bytes >= 0 else "plus"
        yield f"        {sign} {format_bytes(abs(item.size_bytes))} {item.name}: {item.reason}"


def probe_dict(record: ProbeRecord) -> dict[str, Any]:
    """The measurements of a device: as an object for programs."""
    return {"schema_version": CALIBRATE_SCHEMA_VERSION, **asdict(record)}


def probe_text(record: ProbeRecord) -> str:
    """The measurements of a device for a person, and notes on those that failed."""
    context = "not known" if record.context_bytes is None else format_bytes(record.context_bytes)
    lines = [f"measured of {record.device}", f"  {'driver context':<28} {context}"]
    lines += [
        f"  {name:<28} {'not known' if rate is None else f'{rate / unit:.3g} {word}'}"
        for name, rate, unit, word in _probe_rows(record)
    ]
    return "\n".join([*lines, *(f"note: {name}: {reason}" for name, reason in record.notes.items())])


def _probe_rows(record: ProbeRecord) -> Iterator[tuple[str, float | None, float, str]]:
    """Each rate: its name, the rate, and the unit it is shown in."""
    yield "host to device, page-locked", record.pinned_to_device_bytes_per_s, 1e9, "GB/s"
    yield "host to device, pageable", record.pageable_to_device_bytes_per_s, 1e9, "GB/s"
    yield "device to host, page-locked", record.device_to_pinned_bytes_per_s, 1e9, "GB/s"
    yield "device to host, pageable", record.device_to_pageable_bytes_per_s, 1e9, "GB/s"
    yield "memory of the device", record.memory_bytes_per_s, 1e9, "GB/s"
    for side, rate in record.product_flops_per_s.items():
        yield f"products of {side} x {side}", rate, 1e12, "TFLOP/s"
    for size, rate in record.attention_flops_per_s.items():
        yield f"attention, heads of {size}", rate, 1e12, "TFLOP/s"
    yield "kernel launch", record.launch_seconds, 1e-6, "us"
    yield "disk", record.disk_bytes_per_s, 1e9, "GB/s"
