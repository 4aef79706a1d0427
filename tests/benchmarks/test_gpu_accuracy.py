"""`gpu_accuracy.py` runs line by line on the CPU, so that a session with a card finds no mistakes in it."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from vramplan.strategies.settings import parse_decode, parse_placement

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu_accuracy.py"
FILES = (FILE, FILE.with_name("gpu_accuracy_cases.py"))
# What only happens on a card: too little memory, a kernel that is missing, a case that fails and is recorded.
NOT_REACHED = (
    'return row | {"left_out": "too large for this card"}',
    "except RuntimeError as error:",
    'return row | {"stopped": str(error)[:200]}',
    "except torch.OutOfMemoryError as error:",
    'return {"out_of_memory": str(error)[:300]}',
    "except SimulationError as error:",
    'return {"error": str(error)}',
    "except Exception as error:  # one broken case must not cost the others",
    "if pretended:",
    "raise",
    'found["cases"][case.name] = {"error": f"{type(error).__name__}: {error}"[:300]}',
    "lines.append(f\"{name[:88]:88} {real.get('out_of_memory') or made.get('error') or row.get('error')}\"[:200])",
    "continue",
    "tensor.zero_()",  # the small video pipeline has no buffer of integers
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module of its own: pretending changes it."""
    monkeypatch.syspath_prepend(str(FILE.parent))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.pin_memory)  # and put back afterwards
    spec = importlib.util.spec_from_file_location("gpu_accuracy", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_accuracy", module)
    spec.loader.exec_module(module)
    return module


def functions(code: CodeType) -> Iterator[CodeType]:
    for item in code.co_consts:
        if isinstance(item, CodeType):
            yield item
            yield from functions(item)


def test_every_case_has_settings_that_there_are(script: ModuleType) -> None:
    found = script.cases()
    assert len({case.name for case in found}) == len(found) > 30
    for case in found:
        for text in filter(None, (case.head, case.rest)):
            parse_placement(text)
        for text in case.decode:
            parse_decode(text)


def test_every_line_runs_on_the_cpu(script: ModuleType, tmp_path: Path) -> None:
    output, run = tmp_path / "out.json", set[tuple[str, int]]()

    def line(frame: FrameType, event: str, arg: Any) -> Any:
        run.add((frame.f_code.co_filename, frame.f_lineno))
        return line

    def call(frame: FrameType, event: str, arg: Any) -> Any:
        return line(frame, event, arg) if frame.f_code.co_filename in map(str, FILES) else None

    options = ["-o", str(output), "--pretend", "--only", "cogvideox-5b"]
    before = sys.gettrace()
    sys.settrace(call)
    try:
        listed = CliRunner().invoke(script.main, ["--list"])
        cut = CliRunner().invoke(script.main, [*options, "--minutes", "0"])
        done = CliRunner().invoke(script.main, options)
        again = CliRunner().invoke(script.main, options)
    finally:
        sys.settrace(before)
    assert "sequential_cpu_offload" in listed.output
    assert "out of time: start again to go on" in cut.output
    assert done.exit_code == again.exit_code == 0, done.exception
    found = json.loads(output.read_text())
    assert len(found["cases"]) == 2
    assert all(row["measured"]["seconds"] > 0 and row["projected"]["flops"] > 0 for row in found["cases"].values())
    assert found["probes"].keys() == script.PROBES.keys()
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        lines = {
            number
            for code in functions(compile(text, str(file), "exec"))
            if code.co_flags & inspect.CO_OPTIMIZED  # bodies of functions, not of classes
            for *_, number in code.co_lines()
            if number not in (None, code.co_firstlineno)
        }
        reached = {number for name, number in run if name == str(file)}
        left = {text.splitlines()[number - 1].strip() for number in lines - reached}
        assert left <= set(NOT_REACHED)
