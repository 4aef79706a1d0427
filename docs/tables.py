"""Tables of the documentation: results and published figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

TOP = Path(__file__).resolve().parent.parent
RESULTS = TOP / "benchmarks" / "results"


def newest(name: str, ending: str = "md") -> Path:
    """The latest of the results of that name; they carry their dates."""
    return max(RESULTS.glob(f"{name}-[0-9]*.{ending}"))


def result(name: str, *headings: str) -> str:
    """The latest result as it stands, or what stands under these headings of it, each with its heading one lower."""
    text = newest(name).read_text(encoding="utf-8").strip()
    if not headings:
        return text
    sections = dict(re.findall(r"^## (.+?)\n\n(.+?)(?=\n\n## |\Z)", text, re.MULTILINE | re.DOTALL))
    return "\n\n".join(f"### {heading}\n\n{sections[heading].strip()}" for heading in headings)


def result_head(name: str) -> str:
    """What stands before the first heading of the latest result."""
    return newest(name).read_text(encoding="utf-8").partition("\n## ")[0].strip()


def published(*rows: str) -> str:
    """Published peaks beside simulated ones, of the rows of these names."""
    told = {row["id"]: row for row in yaml.safe_load((TOP / "benchmarks" / "published_peaks.yaml").read_text())["rows"]}
    cells = re.findall(r"^\| (\S+) \| (.+) \|$", newest("accuracy").read_text(encoding="utf-8"), re.MULTILINE)
    measured = {name: rest.split(" | ") for name, rest in cells}
    lines = ["| what | read | published | simulated | source |", "|---|---|--:|--:|---|"]
    for name in rows:
        placement, _, metric, gib, simulated, _ = measured[name]
        link = re.match(r"https?://\S+", told[name]["source"])
        source = f"[here]({link[0]})" if link else told[name]["source"]
        lines.append(
            f"| {told[name]['model']}: {placement} | {metric} | {float(gib):.2f} GiB | {simulated} GiB | {source} |"
        )
    return "\n".join(lines)


def accuracy_sentence() -> str:
    """The sentence of the latest result that sums it up."""
    found = re.search(r"^\d+ rows that nothing.+$", newest("accuracy").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[0]


def conformance() -> str:
    """How many of diffusers' own test pipelines run on the simulated device."""
    found = json.loads(newest("conformance", "json").read_text(encoding="utf-8"))
    shares = {name: round(100 * counts["ok"] / found["built"]) for name, counts in found["counts"].items()}
    failed = sum(counts.get("failed", 0) for counts in found["counts"].values())
    return (
        f"Of diffusers' own test pipelines {found['built']} can be built offline; {shares['resident']} % of them run "
        f"on the simulated device all resident, {shares['model']} % with model offload, {shares['group']} % with group "
        f"offload and {shares['sequential']} % with sequential offload. The rest are refused with a reason or cannot "
        f"run anywhere; {failed or 'none'} fails."
    )


def bits() -> str:
    """In how many of diffusers' own test pipelines a plan changed no bit of the result."""
    records = [
        json.loads(newest(name, "json").read_text(encoding="utf-8"))
        for name in ("conformance-bits", "conformance-bits-streaming")
    ]
    plans = {name.removeprefix("bits-"): counts for record in records for name, counts in record["counts"].items()}
    del plans["partial"]  # what weight streaming stands in for today
    states = ("ok", "failed", "refused", "unfit")
    rows = [f"| {name} | {' | '.join(str(each.get(state, 0)) for state in states)} |" for name, each in plans.items()]
    built = " and ".join(str(record["built"]) for record in records)
    return "\n".join(
        [
            f"{built} of them, the latter under weight streaming (stream, half, phase), were called for real, on the "
            "CPU, without a plan and under each of these:",
            "",
            "| plan | the same bits, and undone wholly | not so | refused | plain calls fail or differ |",
            "|---|--:|--:|--:|--:|",
            *rows,
        ]
    )


_MISS = ("row", "card", "strategy", "ratio", "extra", "judged", "why")


def times() -> str:
    """Predicted seconds against published ones, before and after the cost model was rebuilt."""
    found, before = (
        json.loads((RESULTS / name).read_text(encoding="utf-8"))["summary"]
        for name in ("times.json", "times-before-2026-11-28.json")
    )
    rows = [
        ("off by, median", *(f"{item['all']['off_median']:.2f}x" for item in (before, found))),
        ("off by, 9 of 10 rows", *(f"{item['all']['off_p90']:.2f}x" for item in (before, found))),
        ("pairs in the right order", *(f"{item['pairs_right']} of {item['pairs']}" for item in (before, found))),
        (
            "extra seconds of offloading within 1.5x",
            *(f"{item['extras_within_1.5']} of {item['extras']}" for item in (before, found)),
        ),
    ]
    left = [
        f"| {name} | {each['fitted']['off_median']:.2f}x, {each['fitted']['off_p90']:.2f}x | "
        f"{each['roofline']['off_median']:.2f}x, {each['roofline']['off_p90']:.2f}x |"
        for name, each in found.items()
        if name.startswith("one ")
    ]
    return "\n".join(
        [
            f"{found['all']['rows']} published timings:",
            "",
            "| | before | now |",
            "|---|--:|--:|",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            "A fit on these rows alone, judged on the card or model that it was not fitted on (median, 9 of 10 rows):",
            "",
            "| | fitted | bare roofline |",
            "|---|--:|--:|",
            *left,
            "",
            "Off by more than 1.5x, of the whole time or of what offloading adds (predicted / published):",
            "",
            "| row | card | strategy | whole | added | judged | why |",
            "|---|---|---|--:|--:|---|---|",
            *(f"| {' | '.join(miss[key] for key in _MISS)} |" for miss in found["misses"]),
        ]
    )


def time_errors() -> str:
    """By what factors published timings were off, by what the rates rest on."""
    from vramplan.calibration.published_errors import published_uncertainty

    told = {
        "assumed": "no timing of the card's architecture (Turing, Blackwell, other vendors)",
        "fitted": "others have timed cards of its architecture",
        "measured": "by `vramplan calibrate`, on a card of a fitted architecture",
    }
    judged = {
        "assumed": "rows of which no other card of the architecture was fitted on",
        "fitted": "rows of which one was",
        "measured": "the latter and the former, their level set by the card's other rows",
    }
    lines = ["| rates | of the machine | judged on | computing | moving weights |", "|---|---|---|--:|--:|"]
    for basis, text in told.items():
        found = published_uncertainty(basis, "measured" if basis == "measured" else "fitted")
        lines.append(f"| {basis} | {text} | {judged[basis]} | {found.computing:.2f}x | {found.moving:.2f}x |")
    return "\n".join(lines)


def regret() -> str:
    """How the choice compares with stock diffusers calls, by the model's own prices."""
    cases = json.loads(newest("regret", "json").read_text(encoding="utf-8"))
    both = [case for case in cases if case["chosen"] and case["stock"]]
    ratios = [case["stock"]["seconds"] / case["chosen"]["seconds"] for case in both]
    near = sum(ratio < 1.01 for ratio in ratios)
    failures = sum(len(case["failures"]) for case in cases)
    alone = sum(bool(case["chosen"]) and not case["stock"] for case in cases)
    return (
        f"{len({case['pipeline'] for case in cases})} pipelines, {len(cases)} cases of VRAM, RAM and allowed quality, "
        f"by the model's own prices: {failures or 'no'} choice is slower than another candidate or than the fastest "
        f"stock diffusers call that fits. That call is within 1 % of the choice in {near} of {len(both)} cases, and "
        f"takes up to {max(ratios):.1f} times as long; in {alone} more cases no stock call fits and the choice does."
    )
