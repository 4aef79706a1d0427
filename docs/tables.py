"""Tables of the documentation: results and published figures."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

TOP = Path(__file__).resolve().parent.parent
RESULTS = TOP / "benchmarks" / "results"


def newest(name: str) -> Path:
    """The latest of the results of that name; they carry their dates."""
    return max(RESULTS.glob(f"{name}-[0-9]*.md"))


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
