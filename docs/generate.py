"""Fill in what README.md and the pages of the documentation show of the program, so that it is what the program does.

    python docs/generate.py            # write it anew
    python docs/generate.py --check    # change nothing; exit code 1 and the difference where something is out of date

A block starts with a comment that says what it is made by, and ends with `<!-- made -->`:

    <!-- made by: vramplan plan flux.1-dev --device rtx-4070 -o plan.yaml | head -n 12 -->   the command and its output
    <!-- made by: part plan.yaml settings quality -->                   these keys of a file an earlier command wrote
    <!-- made by: table strategy_list -->                               a function of `tables.py` or `strategies.py`

Commands run in one process and in an empty folder, each once, in the order they stand in; what they write is there for
those after them. `--device NAME.yaml` is a machine of the tests (tests/support/recorded_machines). Neither profiles nor
calibration of this machine play a part, and the width is that of a terminal of 100 columns.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from functools import cache
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
PAGES = (TOP / "README.md", *sorted((TOP / "docs").rglob("*.md")))
BLOCK = re.compile(r"<!-- made by: (?P<by>.+?) -->\n.*?<!-- made -->", re.DOTALL)
HEAD = re.compile(r" \| head -n (\d+)$")
MACHINE = re.compile(r"--device (\S+)\.yaml")
# What is never twice the same: the seconds that a simulation took.
VARYING = re.compile(r"(?<= operations in )[0-9.]+(?= s$)", re.MULTILINE)


@cache
def content(by: str) -> str:
    """What stands in the block of these words. Raises RuntimeError: the command failed."""
    kind, _, rest = by.partition(" ")
    if kind == "table":
        return table(rest)
    if kind == "part":
        return part(*rest.split())
    if kind == "vramplan":
        return f"```text\n$ {by}\n{output(by)}\n```"
    raise RuntimeError(f"{by!r}: starts with neither vramplan, part nor table")


def output(command: str) -> str:
    """What a command prints on standard output, cut where it ends in `| head -n N`."""
    from click.testing import CliRunner

    from vramplan.cli.main import main

    for name in MACHINE.findall(command):
        write_machine(name)
    cut = HEAD.search(command)
    result = CliRunner().invoke(main, shlex.split(HEAD.sub("", command))[1:], prog_name="vramplan")
    if result.exit_code:
        raise RuntimeError(f"{command}: exit code {result.exit_code}: {result.output} {result.exception or ''}")
    lines = [line.rstrip() for line in result.stdout.rstrip("\n").split("\n")]
    return "\n".join(lines[: int(cut[1])] if cut else lines)


def write_machine(name: str) -> None:
    """The machine of the tests as `vramplan detect -o NAME.yaml` would have written it there."""
    from pydantic import TypeAdapter

    sys.path.insert(0, str(TOP))
    from tests.support import machines
    from vramplan.hardware.types import Hardware
    from vramplan.view.machine import hardware_dict
    from vramplan.view.shared import to_yaml

    told = json.dumps(machines.load(name)["expected"])
    hardware = TypeAdapter(Hardware).validate_json(told, strict=True)
    Path(f"{name}.yaml").write_text(to_yaml(hardware_dict(hardware, None)) + "\n", encoding="utf-8")


def part(name: str, *keys: str) -> str:
    """Some of the keys at the top of a YAML file, as they stand there."""
    found: dict[str, list[str]] = {}
    key = ""
    for line in Path(name).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith((" ", "-", "#")):
            key = line.partition(":")[0]
        found.setdefault(key, []).append(line)
    return "\n".join(["```yaml", *(line for key in keys for line in found[key]), "```"])


def table(words: str) -> str:
    """What the function of that name makes of the other words."""
    sys.path.insert(0, str(TOP / "docs"))
    import strategies
    import tables

    name, *arguments = shlex.split(words)
    made: str = getattr(tables if hasattr(tables, name) else strategies, name)(*arguments)
    return made.strip()


def filled(text: str) -> str:
    """The page with every block made anew."""
    return BLOCK.sub(lambda block: f"<!-- made by: {block['by']} -->\n{content(block['by'])}\n<!-- made -->", text)


def changed() -> Iterator[tuple[Path, str, str]]:
    """The pages that are not what they would be made: as they are, and as they would be."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if VARYING.sub("", new) != VARYING.sub("", text):
            yield page, text, new


def main(arguments: list[str]) -> int:
    """Write, or with `--check` compare. Returns the exit code."""
    # Before any library reads them.
    os.environ |= {"COLUMNS": "100", "HF_HUB_OFFLINE": "1", "VRAMPLAN_CALIBRATION": "0", "DIFFUSERS_VERBOSITY": "error"}
    for name in [name for name in os.environ if re.match(r"VRAMPLAN_(?!CACHE|CALIBRATION)", name)]:
        del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="vramplan-docs-") as folder, chdir(folder):
        os.environ["VRAMPLAN_PROFILES"] = str(Path(folder) / "profiles")
        stale = list(changed())
    for page, text, new in stale:
        name = str(page.relative_to(TOP))
        if "--check" in arguments:
            print("\n".join(difflib.unified_diff(text.split("\n"), new.split("\n"), name, "made anew", lineterm="")))
        else:
            page.write_text(new, encoding="utf-8", newline="\n")
            print(f"wrote {name}")
    if stale and "--check" in arguments:
        print("out of date: run python docs/generate.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
