"""Arguments in sentences, in backticks as Python writes them: the terminal and the page put their own words there."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

# `prompt`, `replan=True`, `allow="lossy"`, `settings["decode"]` and `settings={"decode": "plain"}`.
_ARGUMENT = re.compile(r'`(\w[\w. ]*)(?:=True|="?([^`"{]+)"?|\["([^`"]+)"\]|=\{"([^`"]+)": "([^`"]+)"\})?`')


def respelled(value: Any, spell: Callable[[str, str], str | None]) -> Any:
    """The value with each argument in its texts as `spell` has it, from its name and setting; None leaves it."""
    if isinstance(value, str):
        return _ARGUMENT.sub(lambda found: _spelled(spell, *found.groups("")) or found[0], value)
    if isinstance(value, tuple):
        return tuple(respelled(item, spell) for item in value)
    if is_dataclass(value):
        return replace(value, **{item.name: respelled(getattr(value, item.name), spell) for item in fields(value)})  # type: ignore[type-var]
    return value


def _spelled(
    spell: Callable[[str, str], str | None], name: str, told: str, key: str, axis: str, value: str
) -> str | None:
    return spell(name, told or key or (f"{axis}={value}" if axis else ""))
