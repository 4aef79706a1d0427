"""Functions shared by commands: print, spell arguments as flags, save plots, write files."""

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


def option_names(group: Any) -> dict[str, str]:
    """Map each Python argument to its option, and each function named in messages to its command."""
    options = [item for command in group.commands.values() for item in command.params if isinstance(item, click.Option)]
    found = {str(option.name): max(option.opts, key=len) for option in options}
    found |= {name: found[short] for short, name in SHORT_NAMES.items()} | {"settings": found["fixed"]}
    plan, machine = "vramplan plan MODEL", "vramplan detect -o FILE"
    return found | {"vramplan.plan": plan, "vramplan.dump_plan": f"{plan} -o FILE", "vramplan detect": machine}


def spell_flags(value: Any, group: Any = None) -> Any:
    """Return the value with the arguments in its texts as flags. `group` defaults to the running command group."""
    names = option_names(group or click.get_current_context().find_root().command)
    return respelled(value, lambda name, setting: f"{names[name]} {setting}".rstrip() if name in names else None)


def say(text: str) -> None:
    """Print the text on stderr, unless -q is given."""
    if not is_quiet():
        click.echo(spell_flags(text), err=True)


def parse_set_options(texts: tuple[str, ...]) -> dict[str, list[str]]:
    """Parse the settings given with `--set`, by axis and component.

    Raises:
        UsageError: a text is not of the form `AXIS=SETTING`.
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
    """Print the content as JSON or YAML, or the human-readable view."""
    from vramplan.view.shared import to_json, to_yaml

    if as_json or form == "json":
        click.echo(to_json(content))
    elif form == "yaml":
        click.echo(yaml().rstrip() if yaml else to_yaml(content))
    else:
        from vramplan.view.terminal import show

        show(human())


def save_plot(path: str, shown: Any, plan: Plan | None) -> None:
    """Save a plot of the value, with this machine's last measurement of the plan, and print the path."""
    from vramplan.runtime.recording import last_measured
    from vramplan.view.plot.save import save_picture

    record = None if plan is None else last_measured(plan)
    save_picture(path, spell_flags(shown), None if record is None else record.measured)
    say(f"wrote {path}")


def write_file(path: str, text: str, option: str = "--output") -> None:
    """Write the file whole or not at all, and print its path.

    Raises:
        UsageError: its folder does not exist.
    """
    from vramplan.common.files import write_text

    if not Path(path).parent.is_dir():
        raise UsageError(f"{option} {path}: its folder does not exist")
    write_text(path, text)
    say(f"wrote {path}")
