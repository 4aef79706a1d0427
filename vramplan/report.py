"""Values as text: tables for people, JSON and YAML for programs. The only module that knows columns and colours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from vramplan.units import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vramplan.calibration.records import ProbeRecord
    from vramplan.planfile import Plan, Settings
    from vramplan.simulator.types import Simulation
    from vramplan.workload import Workload

SIMULATE_SCHEMA_VERSION = 1
CALIBRATE_SCHEMA_VERSION = 1
_NUMERIC = (
    "peak",
    "workspace",
    "weights",
    "activations",
    "projected",
    "measured",
    "difference",
    "memory",
    "VRAM",
    "a call",
    "least VRAM",
)
_VERDICT_STYLES = {"chosen": "bold green", "fits": "green", "rejected": "red"}


def to_json(value: Any) -> str:
    """Plain mappings and lists as indented JSON."""
    return json.dumps(value, indent=2)


def to_yaml(value: Any) -> str:
    """Plain mappings and lists as YAML in their own order."""
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, allow_unicode=True).rstrip()


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
    """The plan for a person, as plain text."""
    from vramplan.terminal import as_text

    return as_text(plan_view(plan))


def plan_view(plan: Plan) -> RenderableType:
    """The plan for a person: what was chosen, how near the limit, how fast, and why not the faster one."""
    from vramplan.bars import plan_bar
    from vramplan.terminal import hang, stacked, table

    bar = plan_bar(plan)
    return stacked(
        [
            *(hang(f"{name:<9} {text}", 10) for name, text in plan_rows(plan)),
            *(("", bar) if bar else ()),
            "",
            table(("phase", "runs", "on the device", "weights", "activations"), _phase_rows(plan), _NUMERIC),
            *notes_view(plan.notes),
        ]
    )


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """What a plan says in short: the name of each thing, and the thing."""
    from vramplan.planner.demand import fits_sentence

    card = plan.machine.accelerator.name if plan.machine.accelerator else "the CPU"
    return [
        ("pipeline", f"{plan.model.class_name} ({plan.model.source})"),
        ("on", f"{card} ({plan.machine.device})"),
        ("for", workload_text(plan.workload)),
        ("chosen", settings_text(plan.settings)),
        ("fits", fits_sentence(plan.projected, plan.machine.budget)),
        *_loading_row(plan),
        ("speed", _speed(plan)),
        ("quality", plan.quality.replace("_", " ")),
        ("why", plan.reason),
    ]


def notes_view(notes: Sequence[str]) -> Iterator[RenderableType]:
    """A line for each note."""
    from vramplan.terminal import hang

    return (hang(f"note: {note}", 6, "yellow") for note in notes)


def workload_text(work: Workload) -> str:
    """What is generated: `1360 x 768 x 81 frames, 2 per prompt, 50 steps`."""
    size = "sound" if work.sound else f"{work.width} x {work.height}"
    frames = f" x {work.num_frames} frames" if work.num_frames > 1 else ""
    batch = f", {work.num_images_per_prompt} per prompt" if work.num_images_per_prompt > 1 else ""
    return f"{size}{frames}{batch}, {work.num_inference_steps} steps"


def _loading_row(plan: Plan) -> list[tuple[str, str]]:
    """What loading takes of RAM at most, where it takes some."""
    load = plan.projected.load
    if load is None or not load.ram_bytes:
        return []
    return [("loading", f"at most {format_bytes(load.ram_bytes)} of RAM, while {load.component} is loaded")]


def _speed(plan: Plan) -> str:
    demand = plan.projected
    return (
        f"about {format_seconds(demand.seconds_per_step)} a step, {format_seconds(demand.seconds_per_call)} a call, "
        f"limited by {demand.bottleneck} ({demand.basis})"
    )


def format_seconds(count: float) -> str:
    """Seconds as people read them: `6.6 ms`, `0.84 s`, `69 s`, `2.5 min`."""
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
    others = (settings.weights, settings.attention, settings.compile)
    more = "".join(f" + {name}: {text}" for axis in others for name, text in axis.items())
    return placed + more + "".join(f" + {text}" for text in settings.decode)


def explain_text(plan: Plan) -> str:
    """Every candidate, as plain text."""
    from vramplan.terminal import as_text

    return as_text(explain_view(plan))


def explain_view(plan: Plan) -> RenderableType:
    """Every candidate in three lines: verdict, memory, time and what limits it; the settings; the reason."""
    from rich.text import Text

    from vramplan.terminal import hang, stacked

    lines: list[RenderableType] = [
        f"{len(plan.candidates)} candidates for {plan.model.class_name}; the first is the plan",
        "",
        Text(f"{'':8} {'VRAM':>10} {'RAM':>10} {'step':>9} {'call':>9}  limited by", "bold"),
    ]
    for item in plan.candidates:
        price = item.projected
        sizes = f"{format_bytes(price.vram_reserved_bytes):>10} {format_bytes(price.ram_bytes):>10}"
        times = f"{format_seconds(price.seconds_per_step):>9} {format_seconds(price.seconds_per_call):>9}"
        lines.append(hang(f"{item.verdict:8} {sizes} {times}  {price.bottleneck}", 9, _VERDICT_STYLES[item.verdict]))
        lines += [hang(f"{'':8} {text}", 9) for text in (settings_text(item.settings), item.reason)]
    if plan.refused:
        lines += ["", "not possible here"]
        lines += [hang(f"  {item.setting} on {item.component}: {item.reason}", 2) for item in plan.refused]
    return stacked(lines)


def simulation_dict(simulation: Simulation) -> dict[str, Any]:
    """A simulation as the object `simulate --json` prints."""
    content = asdict(replace(simulation, timeline=None))
    content.pop("timeline")  # a picture's, of no use as text
    return {"schema_version": SIMULATE_SCHEMA_VERSION, **content}


def simulation_text(simulation: Simulation) -> str:
    """A simulation for a person, as plain text."""
    from vramplan.terminal import as_text

    return as_text(simulation_view(simulation))


def simulation_view(simulation: Simulation) -> RenderableType:
    """A simulation for a person: whether it fits, the peaks, and what made them."""
    from vramplan.bars import simulation_bar
    from vramplan.terminal import hang, stacked, table

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
    header = ("phase", "peak", "weights", "activations", "workspace", "made by")
    return stacked(
        [
            *(hang(line, 10) for line in lines),
            "",
            simulation_bar(simulation),
            "",
            table(header, rows, _NUMERIC),
            *notes_view(simulation.notes),
        ]
    )


def probe_dict(record: ProbeRecord) -> dict[str, Any]:
    """What was measured of a device: the object `calibrate --json` prints."""
    return {"schema_version": CALIBRATE_SCHEMA_VERSION, **asdict(record)}


def probe_text(record: ProbeRecord) -> str:
    """What was measured of a device for a person, and what could not be."""
    rates = (
        ("host to device, page-locked", record.pinned_to_device_bytes_per_s, 1e9, "GB/s"),
        ("host to device, pageable", record.pageable_to_device_bytes_per_s, 1e9, "GB/s"),
        ("device to host, page-locked", record.device_to_pinned_bytes_per_s, 1e9, "GB/s"),
        ("memory of the device", record.memory_bytes_per_s, 1e9, "GB/s"),
        ("products in half precision", record.half_flops_per_s, 1e12, "TFLOP/s"),
    )
    context = "not known" if record.context_bytes is None else format_bytes(record.context_bytes)
    lines = [f"measured of {record.device}", f"  {'driver context':<28} {context}"]
    lines += [
        f"  {name:<28} {'not known' if rate is None else f'{rate / unit:.3g} {word}'}"
        for name, rate, unit, word in rates
    ]
    return "\n".join([*lines, *(f"note: {name}: {reason}" for name, reason in record.notes.items())])


def table_view(header: Sequence[str], rows: Iterable[Sequence[str]]) -> RenderableType:
    """A plain table, of whose numbers nothing is ever lost."""
    from vramplan.terminal import table

    return table(header, list(rows), _NUMERIC)
