"""What several commands do: print, name arguments as flags, draw, write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vramplan.common.arguments import respelled
from vramplan.errors import UsageError
from vramplan.workload import SHORT_NAMES

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vramplan.planfile.types import Plan


def is_quiet() -> bool:
    """Whether -q was given."""
    return bool(click.get_current_context().find_root().ensure_object(dict)["quiet"])


def flags(group: Any) -> dict[str, str]:
    """The option of each argument, by its name in Python, and the commands that messages name."""
    options = [item for command in group.commands.values() for item in command.params if isinstance(item, click.Option)]
    found = {str(option.name): max(option.opts, key=len) for option in options}
    found |= {name: found[short] for short, name in SHORT_NAMES.items()} | {"settings": found["fixed"]}
    plan, machine = "vramplan plan MODEL", "vramplan detect -o FILE"
    return found | {"vramplan.plan": plan, "vramplan.dump_plan": f"{plan} -o FILE", "vramplan detect": machine}


def in_flags(value: Any, group: Any = None) -> Any:
    """The value with the arguments in its texts as people type them; `group` is the running one where left out."""
    known = flags(group or click.get_current_context().find_root().command)
    return respelled(value, lambda name, told: f"{known[name]} {told}".rstrip() if name in known else None)


def say(text: str) -> None:
    """Print it on stderr, nothing under -q."""
    if not is_quiet():
        click.echo(in_flags(text), err=True)


def fixed_by_hand(texts: tuple[str, ...]) -> dict[str, list[str]]:
    """The settings of `--set` by axis and component.

    Raises:
        UsageError: one that is no `AXIS=SETTING`.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            raise UsageError(f"--set {text}: write AXIS=SETTING, as in --set placement=resident")
        found.setdefault(key.strip(), []).append(value.strip())
    return found


def show_result(
    content: Any,
    human: Callable[[], RenderableType],
    form: str,
    *,
    as_json: bool = False,
    yaml: Callable[[], str] | None = None,
) -> None:
    """Print the content as JSON or YAML, or what a person is to see."""
    from vramplan.view.shared import to_json, to_yaml

    if as_json or form == "json":
        click.echo(to_json(content))
    elif form == "yaml":
        click.echo(yaml().rstrip() if yaml else to_yaml(content))
    else:
        from vramplan.view.terminal import show

        show(human())


def draw(path: str, shown: Any, plan: Plan | None) -> None:
    """Save a picture of it, with what was measured of this plan here, and say so."""
    from vramplan.runtime.recording import last_measured
    from vramplan.view.plot.save import save_picture

    record = None if plan is None else last_measured(plan)
    save_picture(path, in_flags(shown), None if record is None else record.measured)
    say(f"wrote {path}")


def write_file(path: str, text: str) -> None:
    """Write the file whole or not at all, and say so.

    Raises:
        UsageError: its folder does not exist.
    """
    from vramplan.common.files import write_text

    if not Path(path).parent.is_dir():
        raise UsageError(f"--output {path}: its folder does not exist")
    write_text(path, text)
    say(f"wrote {path}")
