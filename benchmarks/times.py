"""Predicted seconds against seconds that others measured and published (`published_times.yaml`).

    python benchmarks/times.py [--rows FILE] [--fit] [-o benchmarks/results/times.json]

Each row's seconds are the planner's own price of exactly its settings. Judged are the rows with a stated card; of those
whose sources leave a fact out only the order counts: of two rows of one group, more than 3 % apart. FILE is one of
`vramplan calibrate --export`, instead of the published rows: its probes are the rates of their cards.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import yaml

from vramplan.calibration.measured_rates import with_probe
from vramplan.calibration.records import ProbeRecord
from vramplan.hardware.rates import Rates, architecture
from vramplan.hardware.types import Accelerator
from vramplan.pipeline.describe import describe
from vramplan.planner.demand import Demand, Pricer
from vramplan.planner.footprint import Footprint
from vramplan.profiles.catalogue import DeviceProfile, compute_capability, device_accelerator, load_device_profile
from vramplan.simulator.alternatives import Alternatives
from vramplan.simulator.footprint import SimulatedFootprint
from vramplan.simulator.model import SimulatedModel, simulated_footprint
from vramplan.strategies.settings import parse_decode, parse_placement, parse_setting
from vramplan.workload import Workload, make_workload

ROWS = Path(__file__).with_name("published_times.yaml")
APART = 1.03
FITTED_ON = ("high", "fitted")
# A row that no constant explains: a model card's round number, 26 % below three measurements of the same call.
NOT_FITTED_ON = ("cog5_card_a100",)
EXPLAIN_FROM = 1.5
NEUTRAL_REACHED, MOST_FACTOR = 0.6, 3.0
NEUTRAL = {
    "convolution_share": 1.0, "attention_share": 1.0, "wide_attention_share": 1.0, "memory_share": 0.8,
    "launch_seconds": 2e-5, "leaf_seconds": 5e-4, "back_bytes_per_s": 3e9, "stream_share": 0.8,
}  # fmt: skip
Row = Mapping[str, Any]


# ---- the planner's price of a row


@cache
def told() -> Mapping[str, Any]:
    content: Mapping[str, Any] = yaml.safe_load(ROWS.read_text(encoding="utf-8"))
    return content


def exported(path: Path) -> list[Row]:
    """The timings of a file of `vramplan calibrate --export`. Its probes are kept for `card`."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for item in content["probes"]:
        values = {name: value for name, value in item.items() if name not in ("profile", "date")}
        PROBES[item["profile"]] = ProbeRecord(time=item["date"], card=None, **values)
    return [row for row in content["rows"] if "seconds" in row and row["card"]]


PROBES: dict[str, ProbeRecord] = {}


@cache
def card(name: str) -> Accelerator:
    written = told()["cards"].get(name)
    if written is None:
        found = device_accelerator(load_device_profile(name))
        return with_probe(found, PROBES[name], "measured") if name in PROBES else found
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


_PRICERS: dict[str, tuple[Pricer, Any, Any]] = {}


def price(row: Row, accelerator: Accelerator | None = None) -> Demand:
    """The planner's price of the row, on its own card or the one given."""
    if row["id"] not in _PRICERS:
        _PRICERS[row["id"]] = _pricer(row)
    pricer, placed, decode = _PRICERS[row["id"]]
    rates = (accelerator or card(row["card"])).rates
    assert rates is not None
    rates = as_done(row, rates)
    if pricer.rates != rates:
        pricer.rates = rates
        pricer._decodes.clear()
    return pricer(placed, decode)


def as_done(row: Row, rates: Rates) -> Rates:
    """The rates of copies made in another way than today's releases do: page-locked ones tensor by tensor, as streams
    copy them."""
    done = row.get("done", {})
    if done.get("back") == "page-locked":
        link = rates.link_bytes_per_s * rates.stream_share
        rates = replace(rates, pageable_bytes_per_s=link, back_bytes_per_s=link)
    if done.get("files") == "cached":
        rates = replace(rates, disk_bytes_per_s=rates.from_pageable_bytes_per_s)
    return rates


def _pricer(row: Row) -> tuple[Pricer, Any, Any]:
    work, _ = simulated(row)
    spec, footprint = under_weights(row)
    stated = row["placement"]
    texts = {
        part.name: stated if isinstance(stated, str) else stated.get(part.name, "resident") for part in spec.components
    }
    placed = {name: parse_placement(text).complete(spec.component(name)) for name, text in texts.items()}
    decode = tuple(parse_decode(text) for text in row.get("decode", ()))
    return Pricer(spec, work, Remembered(footprint), card(row["card"])), placed, decode


class Remembered:
    """A footprint whose answers are kept: constants change while they are fitted, work does not."""

    def __init__(self, footprint: Footprint) -> None:
        self.workspace_bytes, self.evaluations = footprint.workspace_bytes, footprint.evaluations
        self.makes, self.activation, self.work = map(cache, (footprint.makes, footprint.activation, footprint.work))


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


MISS_CELLS = ("row", "card", "strategy", "ratio", "extra", "judged", "why")
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


def misses(rows: Sequence[Row], found: Mapping[str, float]) -> list[dict[str, str]]:
    """What is off by more than 1.5x: times of all rows, and extra seconds of offloading; why, or that nobody knows."""
    whole = {row["id"]: found[row["id"]] / row["seconds"] for row in rows}
    added = {item["id"]: item["predicted"] / item["published"] for item in extras(rows, found)}
    made = []
    for row in rows:
        ratios = [whole[row["id"]], *([added[row["id"]]] if row["id"] in added else [])]
        if any(ratio <= 0 or off(ratio) > EXPLAIN_FROM for ratio in ratios):
            cells = {"row": row["id"], "card": row["card"], "strategy": row["strategy"], "ratio": f"{ratios[0]:.2f}"}
            cells |= {"extra": f"{ratios[1]:.2f}" if ratios[1:] else "", "why": row.get("why", "NOT EXPLAINED")}
            made.append(cells | {"judged": "yes" if judged(row) else "order alone"})
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
    lines = [
        "| row | card | strategy | per | published | predicted | ratio | bounded by |",
        "|---|---|---|---|--:|--:|--:|---|",
    ]
    for row in rows:
        cells = [
            row["id"],
            row["card"],
            row["strategy"],
            row["per"],
            f"{row['seconds']:.4g}",
            f"{found[row['id']]:.4g}",
        ]
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
        lines.append(
            f"* {' / '.join(pair['pair'])}: published {pair['published']:.3f}, predicted {pair['predicted']:.3f}"
        )
    lines += ["", "What offloading adds, in seconds:", "", "| row | published | predicted |", "|---|--:|--:|"]
    lines += [line([item["id"], f"{item['published']:.3g}", f"{item['predicted']:.3g}"]) for item in added]
    lines += [
        "",
        "Off by more than 1.5x, predicted / published:",
        "",
        line(MISS_CELLS),
        "|---|---|---|--:|--:|---|---|",
    ]
    lines += [line([item[cell] for cell in MISS_CELLS]) for item in misses(rows, found)]
    return "\n".join(lines), told_of


# ---- constants, fitted


@dataclass(slots=True)
class Fit:
    """Constants of `vramplan.hardware.rates` fitted on some rows, as factors on a neutral start.

    Least absolute error of the logarithm. A family of cards without rows takes the median of the others.
    """

    rows: Sequence[Row]
    factors: dict[str, float]

    def accelerator(self, row: Row) -> Accelerator:
        accelerator = card(row["card"])
        rates = accelerator.rates
        assert rates is not None
        families = [value for name, value in self.factors.items() if name.startswith("since")]
        middle = statistics.median(families) if families else 1.0
        changes = {"reached": NEUTRAL_REACHED * self.factors.get(family(row), middle)}
        changes |= {name: start * self.factors.get(name, 1.0) for name, start in NEUTRAL.items()}
        return replace(accelerator, rates=replace(rates, **changes))

    def predicted(self, row: Row) -> float:
        return seconds(row, self.accelerator(row))

    def loss(self, rows: Sequence[Row]) -> float:
        return sum(abs(math.log(self.predicted(row) / row["seconds"])) for row in rows)

    def run(self) -> Fit:
        """Coordinate by coordinate, in steps that get finer."""
        names = [*dict.fromkeys(family(row) for row in self.rows), *NEUTRAL]
        self.factors.update(dict.fromkeys(names, 1.0))
        for step in (1.5, 1.2, 1.07):
            for name in names * 2:
                self._improve(name, step)
        return self

    def constants(self) -> dict[str, float]:
        starts = {**NEUTRAL, **{name: NEUTRAL_REACHED for name in self.factors if name.startswith("since")}}
        return {name: float(f"{starts[name] * factor:.3g}") for name, factor in self.factors.items()}

    def _improve(self, name: str, step: float) -> None:
        touched = [row for row in self.rows if name in NEUTRAL or family(row) == name]
        best = self.loss(touched)
        for factor in (step, 1 / step):
            while True:
                before = self.factors[name]
                self.factors[name] = before * factor
                now = self.loss(touched)
                if now >= best - 1e-6 or self.factors[name] > MOST_FACTOR:
                    self.factors[name] = before
                    break
                best = now


@cache
def capability_of(name: str) -> float | None:
    written = told()["cards"].get(name)
    return float(written["compute_capability"]) if written else compute_capability(card(name).name)


def family(row: Row) -> str:
    """The architecture of the row's card, by the compute capability that it goes back to."""
    found = architecture(capability_of(row["card"]))
    return "unknown" if found is None else f"since {found.since}"


def left_out(rows: Sequence[Row], key: str) -> dict[str, Any]:
    """Errors on rows that the constants were not fitted on, beside those of the bare roofline."""
    fitted, bare = [], []
    for name in dict.fromkeys(row[key] for row in rows):
        own = [row for row in rows if row[key] == name]
        fit = Fit([row for row in rows if row[key] != name], {}).run()
        fitted += [fit.predicted(row) / row["seconds"] for row in own]
        bare += [seconds(row, roofline(row)) / row["seconds"] for row in own]
        click.echo(f"without {name}: {fit.constants()}", err=True)
    return {"fitted": spread(fitted), "roofline": spread(bare)}


def roofline(row: Row) -> Accelerator:
    accelerator = card(row["card"])
    assert accelerator.rates is not None
    ones = dict.fromkeys(
        ("reached", "convolution_share", "attention_share", "wide_attention_share", "memory_share"), 1.0
    )
    link = accelerator.rates.link_bytes_per_s
    free = {"launch_seconds": 0.0, "leaf_seconds": 0.0, "pageable_bytes_per_s": link, "back_bytes_per_s": link}
    return replace(accelerator, rates=replace(accelerator.rates, **ones, **free))


@click.command()
@click.option("--fit", "fitting", is_flag=True, help="Fit the constants, and leave out one card or model at a time.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--rows", "rows_path", type=click.Path(dir_okay=False, exists=True, path_type=Path))
def main(output: Path | None, rows_path: Path | None, fitting: bool) -> None:
    rows = told()["rows"] if rows_path is None else exported(rows_path)
    found = {}
    for row in rows:
        click.echo(row["id"], err=True)
        found[row["id"]] = seconds(row)
    text, summary = report(rows, found)
    click.echo(text)
    if fitting:
        fitted_on = [row for row in rows if row["confidence"] in FITTED_ON and row["id"] not in NOT_FITTED_ON]
        fit = Fit(fitted_on, {}).run()
        summary["fitted"] = fit.constants()
        click.echo(f"fitted: {summary['fitted']}, {spread(fit.predicted(row) / row['seconds'] for row in fitted_on)}")
        for key in ("card", "model"):
            summary[f"one {key} left out"] = left_out(fitted_on, key)
            click.echo(f"one {key} left out: {summary[f'one {key} left out']}")
    if output:
        summary["misses"] = misses(rows, found)
        made = {"summary": summary, "rows": {row["id"]: [row["seconds"], round(found[row["id"]], 4)] for row in rows}}
        output.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
