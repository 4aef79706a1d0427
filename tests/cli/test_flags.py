"""The library names arguments as Python writes them; only the terminal spells flags."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vramplan
from vramplan.cli.main import main
from vramplan.cli.shared import option_names, spell_flags
from vramplan.common.arguments import _ARGUMENT, respelled
from vramplan.planfile.file import load_plan
from vramplan.view.plan import explain_view
from vramplan.view.terminal import as_text

PACKAGE = Path(vramplan.__file__).parent
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if "cli" not in path.relative_to(PACKAGE).parts]
OTHERS = {
    "runtime/download.py": "--revision --include",  # of `hf download`, which is to be typed
    "hardware/intel.py": "--index-url",  # of `pip install`
    "view/plot/matplotlib_figures.py": "--",  # a dashed line
}
COMMANDS = {"vramplan apply", "vramplan calibrate", "vramplan profiles list"}  # no function of Python does it
VALUE = "vram"  # stands for what is filled in


def texts(path: Path, *, docstrings: bool) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and not docstrings:
            skipped.add(body[0].value)
        if isinstance(node, ast.JoinedStr):
            parts = node.values
            skipped.update(parts)
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_text_outside_the_terminal_spells_a_flag(path: Path) -> None:
    found = [flag for text in texts(path, docstrings=True) for flag in re.findall(r"(?<![\w-])--(?:[a-z-]+|$)", text)]
    assert set(found) <= set(OTHERS.get(path.relative_to(PACKAGE).as_posix(), "").split())


def test_every_argument_that_a_message_names_is_an_option() -> None:
    known = option_names(main)
    named = {found[1] for path in FILES for text in texts(path, docstrings=False) for found in _ARGUMENT.finditer(text)}
    assert named - COMMANDS <= known.keys()
    assert {"allow", "allow_pickle", "device", "margin", "model", "num_frames", "prompt", "replan", "settings"} <= named


def test_every_option_exists() -> None:
    taken = {opt for command in main.commands.values() for item in command.params for opt in item.opts}
    for name, typed in option_names(main).items():
        first, *words = typed.split()
        if first == "vramplan":
            command = main.commands[words[0]]
            options = {opt for item in command.params for opt in item.opts}
            assert {word for word in words if word.startswith("-")} <= options
            assert hasattr(vramplan, re.split("[. ]", name)[1])
        else:
            assert typed in taken


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("give `prompt`", "give --prompt"),
        ("(`replan=True` does so)", "(--replan does so)"),
        ('`allow="near_lossless"` would', "--allow near_lossless would"),
        ("give `model=FOLDER`, where", "give --model FOLDER, where"),
        ("`allow_pickle=True`, `num_frames`", "--allow-pickle, --frames"),
        ('`settings["decode"]`: no', "--set decode: no"),
        (
            'with `settings={"weights.unet": "gguf:file=a b.gguf"}`',
            "with --set weights.unet=gguf:file=a b.gguf",
        ),
        ("write one with `vramplan detect`", "write one with vramplan detect -o FILE"),
        ("make one with `vramplan.dump_plan`", "make one with vramplan plan MODEL -o FILE"),
        ("load it with `vramplan apply`", "load it with `vramplan apply`"),
        ("`nvidia-smi -L` and `leaf`", "`nvidia-smi -L` and `leaf`"),
    ],
)
def test_an_argument_is_typed_as_a_flag(text: str, typed: str) -> None:
    assert spell_flags(text, main) == typed


def test_all_of_a_plan_is_respelled_and_else_unchanged() -> None:
    plan = load_plan(Path(__file__).parent.parent / "view" / "snapshots" / "plan.yaml")
    told = spell_flags(plan, main)
    assert '`allow="near_lossless"`' in as_text(explain_view(plan))
    assert "only near lossless: --allow near_lossless" in as_text(explain_view(told))
    assert respelled(told, lambda name, value: None) == told
    assert told.settings == plan.settings
    assert as_text(explain_view(plan)).replace('`allow="near_lossless"`', "--allow near_lossless") == as_text(
        explain_view(told)
    )


def test_every_command_shows_flags() -> None:
    from click.testing import CliRunner

    path = Path(__file__).parent.parent / "view" / "snapshots" / "plan.yaml"
    shown = CliRunner().invoke(main, ["explain", str(path)]).stdout
    assert "--allow near_lossless" in shown
    assert "`allow" not in shown
    content = CliRunner().invoke(main, ["explain", str(path), "--json"]).stdout
    assert "`allow=" in content
    failed = CliRunner().invoke(main, ["plan", "x.gguf"])
    assert "part of: --set weights.transformer=gguf:file=x.gguf" in failed.stderr
