"""Strict reading of plain YAML: no tags, no aliases, no duplicate keys, and limits on size."""

from __future__ import annotations

from functools import cache
from typing import Any

from vramplan.errors import VramplanError

# A plan has at most 60,000 characters, 5,000 events, six levels, and numbers of 20 digits; the limits are above that.
_MOST_CHARACTERS = 1 << 19
_MOST_EVENTS = 50_000
_MOST_DEPTH = 20
_MOST_DIGITS = 40


def read_plain_yaml(text: str, name: str) -> Any:
    """Parse YAML text into plain values; messages begin with `name`.

    Raises:
        VramplanError: not YAML, too large, or more than plain values: tags, aliases, a duplicate key.
    """
    import yaml

    if len(text) > _MOST_CHARACTERS:
        raise VramplanError(f"{name}: more than {_MOST_CHARACTERS} characters: not a plan")
    try:
        _check_events(text)
        return yaml.load(text, Loader=_plain_loader())
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise VramplanError(f"{name}{where}: not readable YAML ({' '.join(problem.split())})") from error
    except (ValueError, ArithmeticError) as error:  # an impossible date, a half of a character
        raise VramplanError(f"{name}: not readable YAML ({error})") from error


def _check_events(text: str) -> None:
    """Raise YAMLError for aliases, which can expand beyond the memory, tags, deep nesting and long documents."""
    import yaml

    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_parser())):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        problem = "a plan has no aliases" if isinstance(event, yaml.AliasEvent) else ""
        problem = problem or ("a plan has no tags" if getattr(event, "tag", None) else "")
        problem = problem or ("nested too deep for a plan" if depth > _MOST_DEPTH else "")
        problem = problem or ("too long for a plan" if number > _MOST_EVENTS else "")
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]


def _parser() -> type[Any]:
    """libyaml's parser, ten times as fast; PyYAML's own parser if built without libyaml."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def _plain_loader() -> type[Any]:
    """YAML's safe loader, which also refuses duplicate keys (PyYAML silently takes the last) and numbers longer than
    `_MOST_DIGITS`, whose digits PyYAML adds up one by one."""
    import yaml

    class Loader(_parser()):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if str(key.value) in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
                seen.add(str(key.value))
            return super().construct_mapping(node, deep=deep)

    def number(kind: str) -> Any:
        real = yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{kind}"]

        def construct(loader: Any, node: Any) -> Any:
            if len(node.value) > _MOST_DIGITS:
                raise yaml.MarkedYAMLError(
                    problem=f"a number of {len(node.value)} digits", problem_mark=node.start_mark
                )
            return real(loader, node)

        return construct

    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", number(kind))
    return Loader


def validation_message(error: Any) -> str:
    """The first error of a pydantic validation, as `settings.decode: message`."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    words = {
        "missing": "is missing",
        "missing_argument": "is missing",
        "missing_keyword_only_argument": "is missing",
        "unexpected_keyword_argument": "is not a key here",
    }
    return f"{path} {words[first['type']]}" if first["type"] in words else f"{path}: {first['msg']}"
