"""Simulated peaks against peaks that others measured and published (`published_peaks.yaml`).

    python benchmarks/accuracy.py [-o FILE.md]

Prints a table; rows whose code differs from the installed diffusers are listed apart, with the difference.
"""

from __future__ import annotations

import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import yaml

from vramplan.models import describe
from vramplan.simulator.source import Source
from vramplan.strategies.settings import grouped, parse_decode, parse_placement
from vramplan.units import GIB
from vramplan.workload import make_workload

ROWS = Path(__file__).with_name("published_peaks.yaml")


def simulated_gib(row: dict[str, Any], sources: dict[str, Any]) -> float:
    if row["model"] not in sources:
        described = describe(row["model"])
        sources[row["model"]] = (Source(row["model"], described.spec), described)
    source, described = sources[row["model"]]
    names = [component.name for component in described.spec.components]
    told = row["placement"]
    texts = dict.fromkeys(names, told) if isinstance(told, str) else told
    placement = {name: parse_placement(text).complete(described.spec.component(name)) for name, text in texts.items()}
    decodes = [(parse_decode(text), ["vae"]) for text in row.get("decode", ())]
    work = make_workload(described.defaults, row.get("workload", {}))
    result = source.run(work, grouped(placement), decodes, accelerator=None)
    peak = result.peak_reserved_bytes if row["metric"] == "reserved" else result.peak_allocated_bytes
    return peak / GIB


def table(rows: list[tuple[dict[str, Any], float]]) -> list[str]:
    lines = [
        "| row | placement | metric | published GiB | simulated GiB | error |",
        "|---|---|---|--:|--:|--:|",
    ]
    for row, found in rows:
        placed = row["placement"] if isinstance(row["placement"], str) else "by component"
        placed += "".join(f" + {text}" for text in row.get("decode", ()))
        error = found / row["gib"] - 1
        lines.append(f"| {row['id']} | {placed} | {row['metric']} | {row['gib']:g} | {found:.2f} | {error:+.1%} |")
    return lines


def report() -> str:
    sources: dict[str, Any] = {}
    rows = [(row, simulated_gib(row, sources)) for row in yaml.safe_load(ROWS.read_text(encoding="utf-8"))]
    same = [item for item in rows if "version" not in item[0]]
    other = [item for item in rows if "version" in item[0]]
    judged = [abs(found / row["gib"] - 1) for row, found in same if not row.get("fitted")]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    return "\n".join(
        [
            f"Simulated with {libraries}.",
            "",
            *table(same),
            "",
            f"{len(judged)} rows that nothing was fitted on: median error {statistics.median(judged):.1%}, "
            f"largest {max(judged):.1%}.",
            "",
            "Measured on other versions, with the difference explained:",
            "",
            *table(other),
            "",
            *(f"* {row['id']}: {row['version']}" for row, _ in other),
        ]
    )


@click.command()
@click.option("-o", "--output", type=click.Path(dir_okay=False))
def main(output: str | None) -> None:
    text = report()
    print(text)
    if output:
        Path(output).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
