"""Values as text: tables for people, JSON and YAML for programs. The only module that knows columns and colours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from io import StringIO
from typing import TYPE_CHECKING, Any

from vramplan.hardware.types import Accelerator, Budget, Deduction, Hardware
from vramplan.units import format_bytes

if TYPE_CHECKING:
    from vramplan.planfile import Plan, Settings
    from vramplan.simulator.types import Simulation
    from vramplan.verify import Measured

DETECT_SCHEMA_VERSION = 1
SIMULATE_SCHEMA_VERSION = 1
_NUMERIC = ("peak", "workspace", "weights", "activations", "projected", "measured", "difference")


def to_json(value: Any) -> str:
    """Plain mappings and lists as indented JSON."""
    return json.dumps(value, indent=2)


def to_yaml(value: Any) -> str:
    """Plain mappings and lists as YAML in their own order."""
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, allow_unicode=True).rstrip()


def hardware_dict(hardware: Hardware, budget: Budget) -> dict[str, Any]:
    """The machine and what may be used of it: the object `detect --json` prints."""
    content = asdict(hardware)
    return {
        "schema_version": DETECT_SCHEMA_VERSION,
        **content,
        "budget": asdict(budget),
    }


def hardware_text(hardware: Hardware, budget: Budget) -> str:
    """The machine for a person: each memory, what is taken off it and why, and what is left to use."""
    lines = []
    for accelerator in hardware.accelerators:
        lines.append(_accelerator_line(accelerator))
    if not hardware.accelerators:
        lines.append("accelerator   none found: plans are for the CPU")
    host = hardware.host
    lines.append(f"RAM           {format_bytes(host.total_bytes)}, {format_bytes(host.available_bytes)} available")
    if host.limit_bytes is not None:
        lines.append(f"RAM limit     {format_bytes(host.limit_bytes)} ({host.limit_source})")
    if host.disk_free_bytes is not None:
        lines.append(f"disk          {format_bytes(host.disk_free_bytes)} free where weights may be offloaded to")
    lines += ["", "may be used"]
    if budget.vram_bytes is not None:
        lines += _budget_lines("VRAM", budget.vram_bytes, [d for d in budget.deductions if d.memory == "vram"])
    lines += _budget_lines("RAM", budget.ram_bytes, [d for d in budget.deductions if d.memory == "ram"])
    lines += [f"note: {note}" for note in hardware.notes]
    return "\n".join(lines)


def _accelerator_line(accelerator: Accelerator) -> str:
    free = "free unknown" if accelerator.free_bytes is None else f"{format_bytes(accelerator.free_bytes)} free"
    shared = ", shared with the CPU" if accelerator.unified else ""
    return f"{accelerator.device:<13} {accelerator.name}: {format_bytes(accelerator.total_bytes)}, {free}{shared}"


def _budget_lines(memory: str, count: int, deductions: Sequence[Deduction]) -> Iterable[str]:
    yield f"  {memory:<5} {format_bytes(count):>10}"
    for item in deductions:
        sign = "less" if item.size_bytes >= 0 else "plus"
        yield f"        {sign} {format_bytes(abs(item.size_bytes))} {item.name}: {item.reason}"


def profiles_text(names: Mapping[str, Sequence[str]], own: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """The profiles' names by kind. `own` holds the user's, by kind and name, each with the mistakes in its file."""
    return "\n".join(
        line for kind in names for line in (kind, *(_profile_line(name, own[kind]) for name in names[kind]))
    )


def _profile_line(name: str, own: Mapping[str, Sequence[str]]) -> str:
    if name not in own:
        return f"  {name}"
    return f"  {name}  yours" + (f", cannot be used: {own[name][0]}" if own[name] else "")


def plan_text(plan: Plan) -> str:
    """The plan for a person: what was chosen, how near the limit, how fast, and why not the faster one."""
    from vramplan.planner.demand import fits_sentence

    work = plan.workload
    frames = f" x {work.num_frames} frames" if work.num_frames > 1 else ""
    batch = f", {work.num_images_per_prompt} per prompt" if work.num_images_per_prompt > 1 else ""
    card = plan.machine.accelerator.name if plan.machine.accelerator else "the CPU"
    rows = [
        ("pipeline", f"{plan.model.class_name} ({plan.model.source})"),
        ("on", f"{card} ({plan.machine.device})"),
        ("for", f"{work.width} x {work.height}{frames}{batch}, {work.num_inference_steps} steps"),
        ("chosen", settings_text(plan.settings)),
        ("fits", fits_sentence(plan.projected, plan.machine.budget)),
        ("speed", _speed(plan)),
        ("quality", plan.quality.replace("_", " ")),
        ("why", plan.reason),
    ]
    lines = [f"{name:<9} {text}" for name, text in rows]
    lines += ["", _table(("phase", "runs", "on the device", "weights", "activations"), _phase_rows(plan))]
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _speed(plan: Plan) -> str:
    demand = plan.projected
    return (
        f"about {_seconds(demand.seconds_per_step)} a step, {_seconds(demand.seconds_per_call)} a call, limited by "
        f"{demand.bottleneck} ({demand.basis})"
    )


def _seconds(count: float) -> str:
    if count < 0.01:
        return f"{count * 1000:.2g} ms"
    return f"{count / 60:.1f} min" if count >= 120 else f"{count:.2g} s" if count < 10 else f"{count:.0f} s"


def _phase_rows(plan: Plan) -> list[Sequence[str]]:
    return [
        (
            phase.name,
            phase.component,
            ", ".join(phase.on_device),
            format_bytes(phase.weights_bytes),
            format_bytes(phase.activation_bytes),
        )
        for phase in plan.projected.phases
    ]


def settings_text(settings: Settings) -> str:
    """The settings in a few words: equal placements together, then the decode."""
    groups: dict[str, list[str]] = {}
    for name, text in settings.placement.items():
        groups.setdefault(text, []).append(name)
    if len(groups) == 1:
        placed = next(iter(groups))
    else:
        placed = "; ".join(f"{', '.join(names)}: {text}" for text, names in groups.items())
    weights = "".join(f" + {name}: {text}" for name, text in settings.weights.items())
    return placed + weights + "".join(f" + {text}" for text in settings.decode)


def explain_text(plan: Plan) -> str:
    """Every candidate in three lines: verdict, memory, time and what limits it; the settings; the reason."""
    lines = [
        f"{len(plan.candidates)} candidates for {plan.model.class_name}; the first is the plan",
        "",
        f"{'':8} {'VRAM':>10} {'RAM':>10} {'step':>9} {'call':>9}  limited by",
    ]
    for item in plan.candidates:
        price = item.projected
        sizes = f"{format_bytes(price.vram_reserved_bytes):>10} {format_bytes(price.ram_bytes):>10}"
        time = f"{_seconds(price.seconds_per_step):>9} {_seconds(price.seconds_per_call):>9}  {price.bottleneck}"
        lines.append(f"{item.verdict:8} {sizes} {time}")
        lines += [f"{'':8} {settings_text(item.settings)}", f"{'':8} {item.reason}"]
    if plan.refused:
        lines += ["", "not possible here"]
        lines += [f"  {item.setting} on {item.component}: {item.reason}" for item in plan.refused]
    return "\n".join(lines)


def simulation_dict(simulation: Simulation) -> dict[str, Any]:
    """A simulation as the object `simulate --json` prints."""
    return {"schema_version": SIMULATE_SCHEMA_VERSION, **asdict(simulation)}


def simulation_text(simulation: Simulation) -> str:
    """A simulation for a person: whether it fits, the peaks, and what made them."""
    limit = "" if simulation.capacity_bytes is None else f" of {format_bytes(simulation.capacity_bytes)}"
    verdict = {None: "no limit was set", True: "fits", False: "does not fit"}[simulation.fits]
    lines = [
        f"VRAM      {format_bytes(simulation.peak_reserved_bytes)} reserved{limit}, "
        f"{format_bytes(simulation.peak_allocated_bytes)} allocated: {verdict}",
        f"RAM       {format_bytes(simulation.host_peak_bytes)}, of which "
        f"{format_bytes(simulation.pinned_peak_bytes)} page-locked",
        f"moved     {format_bytes(simulation.to_device_bytes)} to the device, "
        f"{format_bytes(simulation.to_host_bytes)} back, in {simulation.steps} steps",
        f"simulated {simulation.operations} operations in {simulation.wall_seconds:.1f} s",
        "",
    ]
    rows = [
        (
            phase.name,
            format_bytes(phase.peak_allocated_bytes),
            format_bytes(phase.weights_bytes),
            format_bytes(phase.activation_bytes),
            format_bytes(phase.workspace_bytes),
            f"{phase.module or 'the pipeline'}: {phase.operation}" if phase.operation else "moving weights",
        )
        for phase in simulation.phases
    ]
    lines.append(_table(("phase", "peak", "weights", "activations", "workspace", "made by"), rows))
    lines += [f"note: {note}" for note in simulation.notes]
    return "\n".join(lines)


def measured_text(plan: Plan, measured: Measured) -> str:
    """Projected against measured, side by side."""
    demand = plan.projected
    rows = [
        _versus("VRAM allocated", demand.vram_allocated_bytes, measured.vram_allocated_bytes),
        _versus("VRAM reserved", demand.vram_reserved_bytes, measured.vram_reserved_bytes),
        _versus("RAM", demand.ram_bytes, measured.ram_bytes),
    ]
    rows = [row for row in rows if row is not None]
    rows.append(("time", _seconds(demand.seconds_per_call), _seconds(measured.seconds), ""))
    return _table(("", "projected", "measured", "difference"), [row for row in rows if row is not None])


def _versus(name: str, projected: int, measured: int | None) -> tuple[str, str, str, str] | None:
    if measured is None:
        return None
    difference = f"{(projected - measured) / measured:+.1%}" if measured else ""
    return name, format_bytes(projected), format_bytes(measured), difference


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain table as wide as the terminal, its last column wrapped; no colours where none are wanted."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in header:
        numeric = name in _NUMERIC
        table.add_column(name, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
    for row in rows:
        table.add_row(*row)
    out = StringIO()
    Console(file=out, width=_width(), color_system=None, markup=False, highlight=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n"))


def _width() -> int:
    import shutil

    return max(60, min(140, shutil.get_terminal_size((100, 24)).columns))
