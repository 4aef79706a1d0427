"""Read mutated plans: each ends in a plan or in one clear line, within a second.

python benchmarks/plan_fuzz.py [--count 10000] [--seed 0]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.mutations import mutant
from vramplan import plan
from vramplan.errors import VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.planfile.file import dump_plan, load_plan, parse_plan
from vramplan.planfile.match import parse_settings
from vramplan.planfile.types import Plan

CARD = Accelerator(kind="cuda", index=0, name="a card", total_bytes=8 << 30, free_bytes=8 << 30)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 << 30, available_bytes=30 << 30))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    text = dump_plan(plan("flux.1-dev", device=MACHINE, simulate=False, allow="lossy"))
    head = text[: text.index("candidates:")]  # most mutants of the whole text are of its candidates
    ends, slowest = fuzzed([text, *[head] * 9], args.count, args.seed)
    print(f"{args.count} mutants: {dict(ends)}; slowest {slowest:.2f} s of the CPU")


def fuzzed(texts: list[str], count: int, seed: int) -> tuple[Counter[str], float]:
    """How many of the mutants ended how, and the seconds of the CPU that the slowest took to read."""
    random = Random(seed)
    ends: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.yaml"
        for number in range(count):
            data = mutant(texts[number % len(texts)], random)
            path.write_bytes(data)
            started = time.process_time()
            read, settings = _end(path, number)
            slowest = max(slowest, time.process_time() - started)
            ends[_told(read, settings, number)] += 1
    return ends, slowest


def _end(path: Path, number: int) -> tuple[Plan | None, bool]:
    """The plan that is read, None for one clear line instead, and whether its settings are those of a plan."""
    read = None
    try:
        read = load_plan(path)
        parse_settings(read, None, read.machine.accelerator)
    except VramplanError as error:
        assert "\n" not in str(error), (number, str(error))
        return read, False
    return read, True


def _told(read: Plan | None, settings: bool, number: int) -> str:
    if read is None:
        return "refused"
    str(read)
    again = parse_plan(dump_plan(read))
    if not settings:  # names that no strategy has, of characters that YAML folds, may come back as others
        return "a plan whose settings are refused"
    assert again.settings == read.settings, number
    return "a plan"


if __name__ == "__main__":
    main()
