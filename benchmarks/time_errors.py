"""How far off the cost model of time is on published timings that it was not fitted on (`published_times.yaml`).

    python benchmarks/time_errors.py [-o profiles/time_errors.json]

Each row is predicted with constants that were fitted without its card. Computing is judged on calls with everything
resident, moving weights on the seconds that offloading adds to such a call. By what the rates of a machine rest on:

* `assumed`: no other card of the row's architecture was fitted on.
* `fitted`: another one was. What moves weights does not depend on the architecture, and is `fitted` throughout.
* `measured`: the level of the machine is known: the prediction is corrected by the median ratio of the other rows of
  this card (of other models; for weights that move, the other rows of the same source, none of them from a disk).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from times import FITTED_ON, NOT_FITTED_ON, Fit, Row, extras, family, judged, kind_of, off, told

OUTPUT = Path(__file__).parents[1] / "profiles" / "time_errors.json"
ABOUT = (
    "Timings that others measured and published, and what was predicted for them without their card. Made by "
    "`python benchmarks/time_errors.py` from benchmarks/published_times.yaml."
)


def predicted_without_card(rows: Sequence[Row]) -> tuple[dict[str, float], set[str]]:
    """The seconds of every row, fitted without its card; and the rows whose architecture was fitted on all the same."""
    fitted_on = [row for row in rows if row["confidence"] in FITTED_ON and row["id"] not in NOT_FITTED_ON]
    found: dict[str, float] = {}
    known: set[str] = set()
    for card in dict.fromkeys(row["card"] for row in rows):
        click.echo(f"without {card}", err=True)
        fit = Fit([row for row in fitted_on if row["card"] != card], {}).run()
        for row in (row for row in rows if row["card"] == card):
            found[row["id"]] = fit.predicted(row)
            known |= {row["id"]} if family(row) in fit.factors else set()
    return found, known


def as_planned(rows: Sequence[Row]) -> list[Row]:
    """The rows as a plan prices them, which knows nothing of what was inferred from their times (`done`); without the
    one whose copies no release of today makes."""
    kept = (row for row in rows if "back" not in row.get("done", ()))
    return [{key: value for key, value in row.items() if key != "done"} for row in kept]


def errors(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Predicted and published seconds of each row, by what was judged and what the rates rest on."""
    found, known = predicted_without_card(rows)
    kept = [row for row in rows if row["id"] not in NOT_FITTED_ON]
    plain = [row for row in kept if judged(row) and kind_of(row) == "resident"]
    computing = {row["id"]: (found[row["id"]], row["seconds"]) for row in plain}
    for row in plain:
        basis = "fitted" if row["id"] in known else "assumed"
        yield _item("computing", basis, row, *computing[row["id"]])
    others = {row["id"]: [two for two in plain if (two["card"], two["model"] == row["model"]) == (row["card"], False)]
              for row in plain}  # fmt: skip
    yield from _corrected("computing", plain, computing, others)
    moving = {item["id"]: (item["predicted"], item["published"]) for item in extras(kept, found)}
    offloaded = [row for row in kept if row["id"] in moving]
    for row in offloaded:
        yield _item("moving", "fitted", row, *moving[row["id"]])
    from_ram = [row for row in offloaded if "disk" not in row["strategy"]]
    same = {row["id"]: [two for two in from_ram if two["source"] == row["source"] and two["card"] == row["card"]
                        and two is not row] for row in from_ram}  # fmt: skip
    yield from _corrected("moving", from_ram, moving, same)


def _corrected(
    term: str, rows: Sequence[Row], seconds: Mapping[str, tuple[float, float]], others: Mapping[str, Sequence[Row]]
) -> Iterator[dict[str, Any]]:
    for row in rows:
        ratios = [seconds[two["id"]][0] / seconds[two["id"]][1] for two in others[row["id"]]]
        if ratios:
            predicted, published = seconds[row["id"]]
            yield _item(term, "measured", row, predicted / statistics.median(ratios), published)


def _item(term: str, basis: str, row: Row, predicted: float, published: float) -> dict[str, Any]:
    numbers = {"predicted": float(f"{predicted:.4g}"), "published": float(f"{published:.4g}")}
    return {"term": term, "basis": basis, **numbers, "row": row["id"], "source": row["source"]}


@click.command()
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=OUTPUT)
def main(output: Path) -> None:
    found = list(errors(as_planned(told()["rows"])))
    lines = ",\n".join(f"    {json.dumps(item)}" for item in found)
    output.write_text(f'{{\n  "about": {json.dumps(ABOUT)},\n  "timings": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    for kind in dict.fromkeys((item["term"], item["basis"]) for item in found):
        own = sorted(off(i["predicted"] / i["published"]) for i in found if (i["term"], i["basis"]) == kind)
        click.echo(f"{' '.join(kind)}: {len(own)} rows, off by {', '.join(f'{value:.2f}' for value in own)}")


if __name__ == "__main__":
    main()
