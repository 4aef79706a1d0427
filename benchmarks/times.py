"""Predicted seconds against seconds that others measured and published (`published_times.yaml`).

    python benchmarks/times.py [--fit] [-o benchmarks/results/times.json]

Each row's seconds are the planner's own price of exactly its settings. Judged are the rows with a stated card; of those
whose sources leave a fact out only the order counts: of two rows of one group, more than 3 % apart.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import yaml

from vramplan.hardware.types import Accelerator
from vramplan.pipeline.describe import describe
from vramplan.planner.demand import Demand, Pricer
from vramplan.planner.footprint import Footprint
from vramplan.profiles.catalogue import DeviceProfile, device_accelerator, load_device_profile
from vramplan.simulator.alternatives import Alternatives
from vramplan.simulator.footprint import SimulatedFootprint
from vramplan.simulator.model import SimulatedModel, simulated_footprint
from vramplan.strategies.settings import parse_decode, parse_placement, parse_setting
from vramplan.workload import Workload, make_workload

ROWS = Path(__file__).with_name("published_times.yaml")
APART = 1.03
FITTED_ON = ("high", "fitted")
Row = Mapping[str, Any]


# ---- the planner's price of a row


@cache
def told() -> Mapping[str, Any]:
    content: Mapping[str, Any] = yaml.safe_load(ROWS.read_text(encoding="utf-8"))
    return content


@cache
def card(name: str) -> Accelerator:
    written = told()["cards"].get(name)
    if written is None:
        return device_accelerator(load_device_profile(name))
    from pydantic import TypeAdapter

    return device_accelerator(TypeAdapter(DeviceProfile).validate_python(written))


@cache
def model_of(name: str, dtype: str) -> tuple[SimulatedModel, Mapping[str, Any], Alternatives]:
    described = describe(name, dtype=dtype)
    model = SimulatedModel(described.spec)
    return model, described.defaults, Alternatives(model)


_SIMULATED: dict[str, tuple[Workload, SimulatedFootprint]] = {}


def simulated(row: Row) -> tuple[Workload, SimulatedFootprint]:
    """One simulation for each model, workload and kind of kernels, shared by strategies and cards."""
    model, defaults, _ = model_of(row["model"], row["dtype"])
    kernels = {name: value for name, value in model.kernels(card(row["card"])).items() if name != "cublas_bytes"}
    key = json.dumps([row["model"], row["dtype"], row["workload"], kernels])
    if key not in _SIMULATED:
        work = make_workload(defaults, row["workload"])
        _SIMULATED[key] = work, simulated_footprint(model, work, card(row["card"]))
    return _SIMULATED[key]


_UNDER: dict[str, Any] = {}


def under_weights(row: Row) -> tuple[Any, Footprint]:
    """The pipeline with the row's weights, and its footprint."""
    model, _, alternatives = model_of(row["model"], row["dtype"])
    _, stored = simulated(row)
    if "weights" not in row:
        return model.spec, stored
    key = json.dumps([row["model"], row["dtype"], row["workload"], row["weights"], row["card"]])
    if key not in _UNDER:
        weights = {name: parse_setting("weights", text) for name, text in row["weights"].items()}
        _UNDER[key] = alternatives.spec(weights), alternatives.footprint(weights, stored, stored.plain)
    return _UNDER[key]


def price(row: Row, accelerator: Accelerator | None = None) -> Demand:
    """The planner's price of the row, on its own card or the one given."""
    work, _ = simulated(row)
    spec, footprint = under_weights(row)
    stated = row["placement"]
    texts = {part.name: stated if isinstance(stated, str) else stated.get(part.name, "resident") for part in spec.components}
    placed = {name: parse_placement(text).complete(spec.component(name)) for name, text in texts.items()}
    decode = tuple(parse_decode(text) for text in row.get("decode", ()))
    return Pricer(spec, work, footprint, accelerator or card(row["card"]))(placed, decode)


def seconds(row: Row, accelerator: Accelerator | None = None) -> float:
    demand = price(row, accelerator)
    return demand.seconds_per_step if row["per"] == "step" else demand.seconds_per_call


# ---- errors


def off(ratio: float) -> float:
    """By what factor a prediction is off, whichever way."""
    return max(ratio, 1 / ratio)


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def spread(ratios: Iterable[float]) -> dict[str, float]:
    """Count, median of predicted / published, and by what factor predictions are off: median, p90, largest."""
    found = list(ratios)
    errors = [off(ratio) for ratio in found]
    return {
        "rows": len(found),
        "ratio": round(statistics.median(found), 3),
        "off_median": round(statistics.median(errors), 3),
        "off_p90": round(quantile(errors, 0.9), 3),
        "off_largest": round(max(errors), 3),
    }


def judged(row: Row) -> bool:
    return row["confidence"] != "order-only"


def pairs(rows: Sequence[Row], found: Mapping[str, float]) -> list[dict[str, Any]]:
    """Two rows of one group, more than 3 % apart, and whether the prices have them in the same order."""
    made = []
    for one, two in combinations(rows, 2):
        if one["pair_group"] != two["pair_group"] or off(one["seconds"] / two["seconds"]) <= APART:
            continue
        published, predicted = one["seconds"] / two["seconds"], found[one["id"]] / found[two["id"]]
        right = (published > 1) == (predicted > 1)
        made.append({"pair": [one["id"], two["id"]], "published": published, "predicted": predicted, "right": right})
    return made


OFFLOADED = ("model", "sequential", "group")


def extras(rows: Sequence[Row], found: Mapping[str, float]) -> list[dict[str, Any]]:
    """What offloading adds to the resident call of the same group: published and predicted seconds."""
    made = []
    for row in rows:
        kind = next((name for name in OFFLOADED if row["strategy"].startswith(name)), None)
        same = [other for other in rows if other["pair_group"] == row["pair_group"]]
        plain = next((other for other in same if other["strategy"] == "resident" and "decode" not in row), None)
        if kind is None or plain is None or row["per"] != plain["per"] or "weights" in row:
            continue
        added = row["seconds"] - plain["seconds"], found[row["id"]] - found[plain["id"]]
        made.append({"id": row["id"], "kind": kind, "published": added[0], "predicted": added[1]})
    return made


# ---- tables


def line(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def by(rows: Sequence[Row], found: Mapping[str, float], key: Callable[[Row], str]) -> list[str]:
    lines = ["| | rows | predicted / published | off by, median | p90 | largest |", "|---|--:|--:|--:|--:|--:|"]
    for name in dict.fromkeys(map(key, rows)):
        own = [found[row["id"]] / row["seconds"] for row in rows if key(row) == name]
        lines.append(line([name, *spread(own).values()]))
    return lines


def row_table(rows: Sequence[Row], found: Mapping[str, float]) -> list[str]:
    lines = ["| row | card | strategy | per | published | predicted | ratio | bounded by |", "|---|---|---|---|--:|--:|--:|---|"]
    for row in rows:
        cells = [row["id"], row["card"], row["strategy"], row["per"], f"{row['seconds']:.4g}", f"{found[row['id']]:.4g}"]
        lines.append(line([*cells, f"{found[row['id']] / row['seconds']:.2f}", price(row).bottleneck]))
    return lines


def kind_of(row: Row) -> str:
    return next((name for name in OFFLOADED if row["strategy"].startswith(name)), "resident")


def report(rows: Sequence[Row], found: Mapping[str, float]) -> tuple[str, dict[str, Any]]:
    counted = [row for row in rows if judged(row)]
    ratios = [found[row["id"]] / row["seconds"] for row in counted]
    ordered, added = pairs(rows, found), extras(rows, found)
    right = sum(pair["right"] for pair in ordered)
    within = [item for item in added if item["predicted"] > 0 and off(item["predicted"] / item["published"]) <= 1.5]
    told_of = {"all": spread(ratios), "pairs": len(ordered), "pairs_right": right, "extras": len(added)}
    told_of["extras_within_1.5"] = len(within)
    lines = [f"{len(counted)} rows judged: {told_of}", "", *row_table(rows, found), ""]
    for title, key in (("card", lambda row: row["card"]), ("model", lambda row: row["model"]), ("strategy", kind_of)):
        lines += [f"By {title}:", "", *by(counted, found, key), ""]
    lines += ["Pairs in the wrong order:", ""]
    for pair in (pair for pair in ordered if not pair["right"]):
        lines.append(f"* {' / '.join(pair['pair'])}: published {pair['published']:.3f}, predicted {pair['predicted']:.3f}")
    lines += ["", "What offloading adds, in seconds:", "", "| row | published | predicted |", "|---|--:|--:|"]
    lines += [line([item["id"], f"{item['published']:.3g}", f"{item['predicted']:.3g}"]) for item in added]
    return "\n".join(lines), told_of


@click.command()
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path))
def main(output: Path | None) -> None:
    rows = told()["rows"]
    found = {}
    for row in rows:
        click.echo(row["id"], err=True)
        found[row["id"]] = seconds(row)
    text, summary = report(rows, found)
    click.echo(text)
    if output:
        made = {"summary": summary, "rows": {row["id"]: [row["seconds"], round(found[row["id"]], 4)] for row in rows}}
        output.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
