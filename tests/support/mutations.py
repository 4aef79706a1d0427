"""Plans that no program wrote: a real one with something done to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import yaml

_NUMBERS = (
    "-1",
    "0",
    str(1 << 63),
    str(1 << 64),
    "9" * 400,
    "1e400",
    "-1e400",
    ".nan",
    ".inf",
    "-.inf",
    "1e999",
    "0x" + "F" * 40,
)
_HOSTILE: tuple[Callable[[Random], str], ...] = (
    lambda r: r.choice(_NUMBERS),
    lambda r: str(r.choice((1, 7, 1000)) << r.choice((40, 50, 62, 70, 200))),  # terabytes and more
    lambda r: "[" * r.choice((3, 30, 3000)) + "]" * r.choice((0, 3, 3000)),
    lambda r: "{a: " * r.choice((3, 30, 3000)) + "1" + "}" * r.choice((0, 3, 3000)),
    lambda r: '"' + "x" * r.choice((1000, 100_000, 900_000)) + '"',
    lambda r: r.choice(('"\\ud800"', '"\\udfff\\ud800"', '"\\x00"', '"\\U0010FFFF"', '"\\N\\L\\P"')),
    lambda r: r.choice(
        ("null", "true", "no", "~", "''", "2024-01-01", "2024-99-99", "12:30:45", "=", "<<", "!!null x")
    ),
    lambda r: "1" + ":59" * r.choice((3, 300, 200_000)) + r.choice(("", ".5")),
    lambda r: "9" * r.choice((20, 300, 5000, 400_000)),
    lambda r: r.choice(
        ("!!python/object/apply:os.system [exit]", "!!python/name:os.system", "!foo bar", "!!binary eA==")
    ),
    lambda r: r.choice(
        ("!!set {a, b}", "!!omap [a: 1, a: 2]", "!!pairs [a: 1]", "!!int x", "!!float [1]", "!!timestamp 1")
    ),
    lambda r: r.choice(
        ("{? [a] : b}", "{? {a: 1} : b}", "{1: a, 1: b}", "{!!binary eA==: 1}", "{.nan: 1}", "{null: 1}")
    ),
    lambda r: "&a [*a, *a]",
    lambda r: "{<<: {a: 1}, b: 2}",
    lambda r: "[" + "1," * r.choice((10, 10_000, 300_000)) + "]",
    lambda r: json.dumps([r.getrandbits(64) for _ in range(r.choice((1, 50)))]),
)
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))


def mutant(text: str, random: Random) -> bytes:
    """A plan with one to three things done to it: to its values, to its lines, or to its bytes."""
    for _ in range(random.choice((1, 1, 2, 3))):
        text = random.choice((_value, _value, _key, _lines, _content))(text, random)
    data = text.encode("utf-8", "surrogatepass")
    return _bytes(data, random) if random.random() < 0.4 else data


def _value(text: str, random: Random) -> str:
    """Another value on one line."""
    lines = text.split("\n")
    places = [place for place, line in enumerate(lines) if ": " in line and not line.startswith("#")]
    if places:
        place = random.choice(places)
        key = lines[place].partition(": ")[0]
        lines[place] = f"{key}: {random.choice(_HOSTILE)(random)}"
    return "\n".join(lines)


def _key(text: str, random: Random) -> str:
    """Another key, an unhashable one, or one twice."""
    lines = text.split("\n")
    place = random.randrange(len(lines))
    head, colon, rest = lines[place].partition(":")
    lines[place] = random.choice(
        (
            f"{lines[place]}\n{lines[place]}",
            f"{head}x{colon}{rest}",
            f"? [{head.strip()}]\n:{rest}",
            f"*a {colon}{rest}",
        )
    )
    return "\n".join(lines)


def _lines(text: str, random: Random) -> str:
    """A block of lines gone, doubled, moved, indented, or all the rest gone."""
    lines = text.split("\n")
    start = random.randrange(len(lines))
    end = min(len(lines), start + random.choice((1, 2, 10)))
    block = lines[start:end]
    at = random.randrange(len(lines))
    return "\n".join(
        random.choice(
            (
                lines[:start] + lines[end:],
                lines[:end] + block + lines[end:],
                lines[:at] + block + lines[at:],
                lines[:start] + ["  " + line for line in block] + lines[end:],
                lines[:end],
                [*lines, "---", *lines],
                [*lines, *LAUGHS.split("\n")],
            )
        )
    )


def _content(text: str, random: Random) -> str:
    """Well-formed, but with something else at one place of the tree."""
    try:
        content = yaml.load(text, Loader=yaml.CSafeLoader) if len(text) < 100_000 else None
        yaml.dump(content, Dumper=yaml.CSafeDumper)
    except Exception:  # what earlier mutations left may be anything
        content = None
    if not isinstance(content, dict):
        return text
    here: Any = content
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return text
        key = random.choice(keys)
        if isinstance(here[key], dict | list) and here[key] and random.random() < 0.8:
            here = here[key]
            continue
        odd = (
            None,
            True,
            -1,
            0,
            1 << 70,
            1.5,
            float("nan"),
            float("inf"),
            "",
            "x" * 5000,
            "\x85",
            [],
            {},
            [[]],
            {"a": {}},
        )
        here[key] = random.choice((*odd, *_SETTINGS))
        return yaml.dump(content, Dumper=yaml.CSafeDumper, sort_keys=False)


_SETTINGS = (
    "group_offload:blocks=99999999999999999999",
    "group_offload:blocks=-1",
    "group_offload:within=../..",
    "weight_streaming:streamed=1e9",
    "vae_tiling:tile=0x10",
    "layerwise_casting:storage=__class__",
    "resident:resident=resident",
    "__import__('os').system('true')",
)


def _bytes(data: bytes, random: Random) -> bytes:
    """Bits turned over, bytes gone, doubled or made up."""
    raw = bytearray(data)
    for _ in range(random.choice((1, 1, 4, 30))):
        at = random.randrange(len(raw)) if raw else 0
        end = min(len(raw), at + random.choice((1, 3, 100)))
        how = random.randrange(4)
        if how == 0 and raw:
            raw[at] ^= 1 << random.randrange(8)
        elif how == 1:
            del raw[at:end]
        elif how == 2:
            raw[at:at] = raw[at:end]
        else:
            raw[at:at] = random.randbytes(random.choice((1, 2, 8)))
    return bytes(raw)
