"""Parts of several views: notes and tables for people, JSON and YAML for programs, and the list of profiles."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vramplan.planner.demand import PhaseDemand
    from vramplan.simulator.types import SimulatedPhase


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


def to_json(value: Any) -> str:
    """Plain mappings and lists as indented JSON."""
    return json.dumps(value, indent=2)


def to_yaml(value: Any) -> str:
    """Plain mappings and lists as YAML in their own order."""
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, allow_unicode=True).rstrip()


def profiles_text(names: Mapping[str, Sequence[str]], own: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """The profiles' names by kind, as text. `own` has the user's, by kind and name, with the mistakes in each file."""
    return "\n".join(
        line for kind in names for line in (kind, *(_profile_line(name, own[kind]) for name in names[kind]))
    )


def _profile_line(name: str, own: Mapping[str, Sequence[str]]) -> str:
    if name not in own:
        return f"  {name}"
    return f"  {name}  yours" + (f", cannot be used: {own[name][0]}" if own[name] else "")


def blocks_row(phases: Sequence[PhaseDemand | SimulatedPhase]) -> list[tuple[str, str]]:
    """The blocks that stay on the device in each phase, of every component that is streamed; empty without any."""
    names = dict.fromkeys(name for phase in phases for name, (staying, _) in phase.blocks.items() if staying)
    texts = []
    for name in names:
        counted = [(phase.name, *phase.blocks[name]) for phase in phases if name in phase.blocks]
        counts = ", ".join(f"{staying} in {phase}" for phase, staying, _ in counted)
        texts.append(f"{name}: {counts}, of {counted[0][2]} blocks")
    return [("stay", "; ".join(texts))] if texts else []


def notes_view(notes: Sequence[str]) -> Iterator[RenderableType]:
    """One line for each note."""
    from vramplan.view.terminal import hang

    return (hang(f"note: {note}", 6, "yellow") for note in notes)


def table_view(header: Sequence[str], rows: Iterable[Sequence[str]]) -> RenderableType:
    """A plain table whose columns in `_NUMERIC` are never cut or wrapped."""
    from vramplan.view.terminal import table

    return table(header, list(rows), _NUMERIC)
