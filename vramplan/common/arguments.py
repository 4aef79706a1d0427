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
        return _ARGUMENT.sub(
            lambda it: spell(it[1], it[2] or it[3] or "=".join(filter(None, it.group(4, 5)))) or it[0], value
        )
    if isinstance(value, tuple):
        return tuple(respelled(item, spell) for item in value)
    if is_dataclass(value):
        return replace(value, **{item.name: respelled(getattr(value, item.name), spell) for item in fields(value)})  # type: ignore[type-var]
    return value
