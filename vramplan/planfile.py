"""The plan: a YAML file that a person can read, diff and edit, loaded strictly."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from vramplan.errors import UsageError, VramplanError
from vramplan.hardware.types import Accelerator, Budget, Host
from vramplan.pipeline.types import PipelineSpec
from vramplan.planner.candidates import Refused
from vramplan.planner.clock import Bottleneck
from vramplan.planner.demand import Demand
from vramplan.planner.order import Prefer
from vramplan.strategies.base import Quality
from vramplan.units import format_bytes
from vramplan.workload import Workload, make_workload

SCHEMA_VERSION = 1
_BYTES_LINE = re.compile(r"^(\s*(?:- )?\w+_bytes: )(-?\d+)$", re.MULTILINE)
# A plan has 60,000 characters and 5,000 events at most, six levels, and no number of more than 20 digits.
_MOST_CHARACTERS = 1 << 19
_MOST_EVENTS = 50_000
_MOST_DEPTH = 20
_MOST_DIGITS = 40
_HEADER = """\
# A vramplan plan: how to run this pipeline within this memory. `vramplan apply` makes it so.
# The settings may be edited; what cannot work is refused with the reason.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentRecord:
    """A component as it was planned for: its class, weights in bytes, the dtype most of them have, and the variant of
    the files they are loaded from."""

    __pydantic_config__ = {"extra": "forbid"}

    name: str
    class_name: str
    library: str
    dtype: str
    weight_bytes: int
    variant: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """The pipeline a plan is for. `source` is `live`, a folder, `profile:NAME`, or `hub:owner/name@commit`."""

    __pydantic_config__ = {"extra": "forbid"}

    source: str
    class_name: str
    fingerprint: str
    components: tuple[ComponentRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRecord:
    """The machine a plan is for: the torch device, what it is, what may be used of it, and the versions of the
    libraries that its memory depends on."""

    __pydantic_config__ = {"extra": "forbid"}

    device: str
    accelerator: Accelerator | None
    host: Host
    budget: Budget
    software: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked for beside model, machine and workload: planning again keeps it. `settings` are the choices that
    were fixed by hand."""

    __pydantic_config__ = {"extra": "forbid"}

    allow: Quality | None = None
    prefer: Prefer = "speed"
    vram: str | None = None
    ram: str | None = None
    margin: str | None = None
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is to be done: one placement per component, how the VAE decodes (nothing: plainly), and what is done
    to the weights, the attention and the blocks of components (nothing: they stay as they are)."""

    __pydantic_config__ = {"extra": "forbid"}

    placement: Mapping[str, str]
    decode: tuple[str, ...] = ()
    weights: Mapping[str, str] = field(default_factory=dict)
    attention: Mapping[str, str] = field(default_factory=dict)
    compile: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Projected:
    """The price of a candidate in short: bytes, seconds, what most of a step is spent on, and the basis of the
    weakest number."""

    __pydantic_config__ = {"extra": "forbid"}

    vram_allocated_bytes: int
    vram_reserved_bytes: int
    ram_bytes: int
    pinned_bytes: int
    disk_bytes: int
    seconds_per_step: float
    seconds_per_call: float
    bottleneck: Bottleneck
    basis: Literal["measured", "simulated", "derived", "assumed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """A candidate and what became of it."""

    __pydantic_config__ = {"extra": "forbid"}

    settings: Settings
    verdict: Literal["chosen", "fits", "rejected"]
    reason: str
    projected: Projected


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one pipeline is to run one workload on one machine, and why so."""

    __pydantic_config__ = {"extra": "forbid"}

    schema_version: int
    vramplan_version: str
    model: ModelRecord
    workload: Workload
    machine: MachineRecord
    settings: Settings
    quality: Quality
    projected: Demand
    reason: str
    asked: Asked = field(default_factory=Asked)
    notes: tuple[str, ...] = ()
    refused: tuple[Refused, ...] = ()
    candidates: tuple[Considered, ...] = ()

    def __str__(self) -> str:
        from vramplan.report import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        from vramplan.plot.save import picture_html
        from vramplan.report import plan_view
        from vramplan.terminal import as_html

        return as_html(plan_view(self)) + picture_html(self)


def load_options(plan: Plan) -> dict[str, Any]:
    """How the plan's pipeline is to be described again: its dtype where that is one, and the variant of its files."""
    dtypes = {record.dtype for record in plan.model.components}
    variants = (record.variant for record in plan.model.components if record.variant)
    return {"dtype": dtypes.pop() if len(dtypes) == 1 else None, "variant": next(variants, None)}


def fingerprint(spec: PipelineSpec) -> str:
    """A short hash of what the plan depends on: classes, weights and dtypes, not the weights' values."""
    facts = [
        spec.class_name,
        *(
            [c.name, c.class_name, c.weight_bytes, c.parameter_count, c.dtype]
            for c in sorted(spec.components, key=lambda component: component.name)
        ),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain mappings, lists, numbers and text."""
    return asdict(plan)


def dump_plan(plan: Plan) -> str:
    """The plan as YAML: one line for each candidate, and sizes repeated in GiB as comments."""
    import yaml

    content = _plain(plan_to_dict(plan))
    candidates = content.pop("candidates")
    text = yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True)
    text = _BYTES_LINE.sub(lambda match: f"{match[0]}  # {format_bytes(int(match[2]))}", text)
    lines = (
        yaml.safe_dump(item, sort_keys=False, default_flow_style=True, width=1 << 20, allow_unicode=True)
        for item in candidates
    )
    return _HEADER + text + ("candidates:\n" + "".join(f"- {line}" for line in lines) if candidates else "")


def parse_plan(text: str, *, name: str = "plan") -> Plan:
    """The plan that YAML text holds. No tag can make code run: only plain YAML is read.

    Raises:
        VramplanError: not YAML, another schema, an unknown key or a wrong type; the message says where.
    """
    from pydantic import TypeAdapter, ValidationError

    content = read_plain_yaml(text, name)
    _check_schema(content, name)
    try:
        plan = TypeAdapter(Plan).validate_json(json.dumps(content, default=str), strict=True)
        make_workload({}, asdict(plan.workload))
    except ValidationError as error:
        raise VramplanError(f"{name}: {validation_message(error)}") from error
    except UsageError as error:
        raise VramplanError(f"{name}: workload.{error}") from error
    except (TypeError, ValueError) as error:
        raise VramplanError(f"{name}: not a plan ({error})") from error
    return plan


def read_plain_yaml(text: str, name: str) -> Any:
    """The plain values that YAML text holds; `name` is what messages call it.

    Raises:
        VramplanError: not YAML, or more than plain values: tags, aliases, a key given twice.
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
    """Raises YAMLError for what no plan has: aliases, which can stand for more than memory holds; tags; depth."""
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
    """libyaml's parser, ten times as fast; PyYAML's own where it was built without."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def _plain_loader() -> type[Any]:
    """YAML's safe loader without two things: a key given twice, of which the last would win silently, and numbers
    longer than any, whose digits YAML adds up one by one."""
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
    """The first thing a validation found wrong, as `settings.decode: what is wrong`."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    words = {
        "missing": "is missing",
        "missing_argument": "is missing",
        "missing_keyword_only_argument": "is missing",
        "unexpected_keyword_argument": "is not a key here",
    }
    return f"{path} {words[first['type']]}" if first["type"] in words else f"{path}: {first['msg']}"


def load_plan(path: str | Path) -> Plan:
    """The plan in a file. Raises VramplanError where it cannot be read or is no plan."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise VramplanError(f"{path}: cannot be read ({reason}); vramplan plan MODEL -o FILE writes a plan") from error
    return parse_plan(text, name=str(path))


def _check_schema(content: Any, name: str) -> None:
    if not isinstance(content, dict):
        raise VramplanError(f"{name}: not a plan (expected a mapping, found {type(content).__name__})")
    if "accelerators" in content and "host" in content:
        raise VramplanError(f"{name}: a machine, not a plan: vramplan plan MODEL --device {name} plans for it")
    version = content.get("schema_version")
    if version is None:
        raise VramplanError(f"{name}: schema_version is missing: not a plan")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise VramplanError(
            f"{name}: schema_version {version!r}; this vramplan reads {SCHEMA_VERSION}: make the plan again"
        )


def _plain(value: Any, name: str = "") -> Any:
    """Tuples as lists and seconds to four digits: what YAML shows people."""
    if isinstance(value, dict):
        return {str(key): _plain(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) and "seconds" in name else value
