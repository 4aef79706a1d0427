"""The strategies as text, off the registry: what each does, its options, its diffusers calls, what it refuses."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vramplan.strategies import AXES, REGISTRY, Decode, Execution
from vramplan.strategies.base import AtLoad, FileName
from vramplan.strategies.weight_streaming import WeightStreaming

# Each way of decoding acts on one of them; the first is of the size of Stable Diffusion's.
_BLOCKS = (128, 256, 512, 512)
_VAES: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        "block_out_channels": _BLOCKS,
        "down_block_types": ["DownEncoderBlock2D"] * len(_BLOCKS),
        "up_block_types": ["UpDecoderBlock2D"] * len(_BLOCKS),
        "sample_size": 1024,
    },
    "AutoencoderKLHunyuanVideo": {},
    "AutoencoderKLTemporalDecoder": {},
}
# A sentence with fewer letters of its own says nothing without what is filled in.
_LEAST_LETTERS = 20


def strategy_list() -> str:
    """One line for each: its axis, what it is, and what it does to the picture."""
    lines = ["| setting | axis | what it does | quality |", "|---|---|---|---|"]
    for cls in REGISTRY:
        lines.append(f"| `{cls.name}` | {cls.axis} | {_what(cls)} | {_quality(cls)} |")
    return "\n".join(lines)


def axis_list() -> str:
    """One line for each axis: the question it answers, and the strategies on it."""
    lines = ["| axis | the question | settings |", "|---|---|---|"]
    for row in AXES.values():
        lines.append(f"| `{row.name}` | {row.question} | {', '.join(f'`{cls.name}`' for cls in row.strategies)} |")
    return "\n".join(lines)


def strategy_sections() -> str:
    """A section for each."""
    return "\n\n".join("\n\n".join(_section(cls)) for cls in REGISTRY)


def component_refusals() -> str:
    """What a component's class rules out, whatever the strategy."""
    modules = [import_module(f"vramplan.pipeline.{name}") for name in ("component", "execution", "types")]
    found = dict.fromkeys(text for module in modules for text in _module_refusals(module))
    return "\n".join(f"* {text}" for text in found)


def _section(cls: Any) -> Iterator[str]:
    yield f"## {cls.name}"
    yield f"{_what(cls)}"
    yield f"*Axis*: {cls.axis}. *Quality*: {_quality(cls)}."
    yield _plain(cls.__doc__)
    if fields(cls):
        yield "\n".join(_options(cls))
    code = list(_code(cls))
    if code:
        yield "As diffusers calls:\n\n```python\n" + "\n".join(code) + "\n```"
    refused = list(dict.fromkeys(_refusals(cls)))
    if refused:
        yield "It refuses itself, in these words:\n\n" + "\n".join(f"* {text}" for text in refused)


def _what(cls: type) -> str:
    """The first line of its file, without its own name."""
    line = inspect.getdoc(sys.modules[cls.__module__]).split("\n")[0]
    text = line.partition(": ")[2] or line
    return text if "." in text.split()[0] else text[0].upper() + text[1:]


def _quality(cls: type) -> str:
    """What it does to the picture, for each of its options where that differs."""
    kinds: dict[str, list[str]] = {}
    choices = [(field.name, get_args(kind)) for field, kind in _hints(cls) if get_origin(kind) is Literal]
    for name, values in choices or [("", ("",))]:
        for value in values:
            setting = cls(**{name: value}) if name else cls()
            kinds.setdefault(setting.quality.replace("_", " "), []).append(f"`{name}={value}`")
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{', '.join(values)}: {kind}" for kind, values in kinds.items())


def _plain(text: str) -> str:
    return textwrap.dedent("    " + text.strip()).replace("\n    ", "\n")


def _hints(cls: type) -> list[tuple[Any, Any]]:
    hints = get_type_hints(cls)
    return [(field, hints[field.name]) for field in fields(cls)]


def _options(cls: type) -> Iterator[str]:
    yield "| option | takes | left out |\n|---|---|---|"
    for field, kind in _hints(cls):
        if get_origin(kind) is Literal:
            takes = ", ".join(f"`{value}`" for value in get_args(kind))
        else:
            takes = {bool: "`true`, `false`", int: "a whole number", FileName: "a file's name"}.get(kind, "a name")
        default = str(field.default).lower() if kind is bool else str(field.default)
        yield f"| `{field.name}` | {takes} | {f'`{default}`' if default else ''} |"


# ---- the calls


def _code(cls: Any) -> Iterator[str]:
    """The lines that `vramplan code` prints for it, on the first component that it would be tried on."""
    from vramplan.strategies.settings import format_setting

    if AXES[cls.axis].kind is Decode:
        setting, name, module = next(
            (setting, "vae", module) for module, component in _vaes() for setting in _tried(cls, component)
        )
        lines = setting.code([name], {name: module})
    else:
        found = ((setting, part) for part in _parts() for setting in _tried(cls, part))
        setting, part = next(found, (_SAMPLES.get(cls.name, cls()), _parts()[0]))
        lines = setting.code([part.name], "cuda:0")
        if isinstance(setting, AtLoad):
            imported, options = setting.load_code(part)
            lines = [imported, f'{part.class_name}.from_pretrained("MODEL", subfolder="{part.name}"{options})']
            if setting.source is not None:
                lines[1] = f'{part.class_name}.from_single_file("FILE"{options})'
    yield f"# {format_setting(setting)}"
    yield from lines


# Settings whose numbers the planner solves for, as the README's plan has them.
_SAMPLES = {"weight_streaming": WeightStreaming(streamed=36, keep=12, locked=45)}


def _tried(cls: Any, component: Any) -> Iterator[Any]:
    from vramplan.hardware.types import Accelerator
    from vramplan.workload import make_workload

    work = make_workload({}, {"height": 1024, "width": 1024, "num_frames": 61})
    card = Accelerator(kind="mps", index=0, name="any", total_bytes=2**34, free_bytes=None)
    kind = AXES[cls.axis].kind
    yield from cls.variants(component, *({Decode: (work,), Execution: (card,)}.get(kind, ())))


@cache
def _parts() -> list[Any]:
    """Denoisers and an encoder without weights, as they are described."""
    import diffusers
    import torch
    import transformers

    from vramplan.pipeline.component import describe_component

    with torch.device("meta"):
        modules = {
            "transformer": diffusers.FluxTransformer2DModel(),
            "unet": diffusers.UNet2DConditionModel(),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig()),
        }
    return [describe_component(name, module) for name, module in modules.items()]


@cache
def _vaes() -> list[tuple[Any, Any]]:
    """VAEs without weights, and as they are described."""
    import diffusers
    import torch

    from vramplan.pipeline.component import describe_component

    with torch.device("meta"):
        modules = [getattr(diffusers, name)(**config) for name, config in _VAES.items()]
    return [(module, describe_component("vae", module)) for module in modules]


# ---- what it refuses


def _refusals(cls: type) -> Iterator[str]:
    """The sentences of its file's functions that say why not, which give `str | None`."""
    yield from _module_refusals(sys.modules[cls.__module__])


def _module_refusals(module: ModuleType) -> Iterator[str]:
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.FunctionDef) and _says_why_not(node):
            yield from (text for text in _sentences(node, module) if _says_something(text))


def _says_something(text: str) -> bool:
    return len(re.sub(r"[^a-z]", "", text)) >= _LEAST_LETTERS


def _says_why_not(node: ast.FunctionDef) -> bool:
    return node.returns is not None and ast.unparse(node.returns) == "str | None"


def _sentences(node: ast.FunctionDef, module: ModuleType) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Return) and part.value is not None:
            for value in _values(part.value):
                if isinstance(value, ast.JoinedStr | ast.Constant) and isinstance(_text(value), str):
                    yield _text(value)
                elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
                    yield from _elsewhere(getattr(module, value.func.id, None), module)


def _values(value: ast.expr) -> Iterator[ast.expr]:
    """What an expression may give, of several."""
    if isinstance(value, ast.BoolOp):
        yield from (found for one in value.values for found in _values(one))
    elif isinstance(value, ast.IfExp):
        yield from (*_values(value.body), *_values(value.orelse))
    else:
        yield value


def _elsewhere(function: Any, asked: ModuleType) -> Iterator[str]:
    """The sentences of a function of another file."""
    if isinstance(function, FunctionType) and function.__module__ != asked.__name__:
        module = sys.modules[function.__module__]
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        if isinstance(tree, ast.FunctionDef) and _says_why_not(tree):
            yield from _sentences(tree, module)


def _text(value: ast.JoinedStr | ast.Constant) -> str | None:
    """The sentence, with what is filled in by its name in capitals."""
    if isinstance(value, ast.Constant):
        return value.value if isinstance(value.value, str) else None
    parts = [str(part.value) if isinstance(part, ast.Constant) else _named(part) for part in value.values]
    return re.sub(r"([*_])", r"\\\1", "".join(parts))


def _named(part: ast.expr) -> str:
    value = part.value if isinstance(part, ast.FormattedValue) else part
    names = re.findall(r"[A-Za-z_]\w*", ast.unparse(value))
    if {"class_name", "__name__"} & {*names}:
        return "CLASS"
    return names[-1].upper() if isinstance(value, ast.Attribute) else "..."
