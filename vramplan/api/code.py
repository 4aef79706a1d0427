"""A plan as plain diffusers code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vramplan.errors import NothingFitsError, UsageError, VramplanError
from vramplan.pipeline.sources import Folder, Hub, Live, Profile, Source
from vramplan.planfile.types import Plan, all_stock, stock_cost
from vramplan.runtime.call import call_arguments, call_parameters, class_call_arguments
from vramplan.strategies import AXES, Decode
from vramplan.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from vramplan.pipeline.prompt import Encoded
    from vramplan.planfile.script import Script
    from vramplan.strategies.base import Placed


def plan_code(plan: Plan) -> str:
    """The plan as a script of plain diffusers calls, including loading.

    Raises:
        UsageError: the plan was made from a live pipeline; the calls are then on the applied plan's `calls`.
        VramplanError: a name in the plan is not a valid Python identifier.
    """
    return "\n".join([_title(plan), *_script(plan).lines()])


def stock_code(plan: Plan) -> str:
    """The fastest stock plan for the plan's request as a script that needs no vramplan, including the call.

    Raises:
        NothingFitsError: no stock plan fits.
        UsageError: the plan was made from a live pipeline.
        VramplanError: a name in the plan is not a valid Python identifier, or the plan records no stock plan.
    """
    stock = _stock_plan(plan)
    script = _script(stock)
    script = replace(script, call=_stock_call(stock, [setting for setting, _ in script.decodes]))
    seconds = format_seconds(plan.projected.seconds_per_call)
    cost = f"{stock_cost(plan)}; the plan takes {seconds}" if stock is not plan else "the plan itself"
    return "\n".join([_title(stock), f"# stock: {cost}", *script.lines()])


def _stock_plan(plan: Plan) -> Plan:
    """The plan itself if it is stock, else the stock plan it records as one of its own."""
    if all_stock(plan.settings):
        return plan
    if plan.stock is None:
        raise VramplanError("this plan records no stock plan: make the plan again")
    found = plan.stock
    if found.settings is None or found.quality is None or found.projected is None:
        raise NothingFitsError(f"no stock plan: {found.reason}")
    return replace(
        plan, settings=found.settings, quality=found.quality, projected=found.projected, reason=found.reason, stock=None
    )


def _stock_call(plan: Plan, decodes: Sequence[Decode]) -> dict[str, Any]:
    """The arguments of the plan's call; those that only the user knows are `...`."""
    import diffusers

    from vramplan.planfile.script import PROMPT
    from vramplan.strategies.decode_chunk_size import DecodeChunkSize

    cls = getattr(diffusers, plan.model.class_name, None)
    if not isinstance(cls, type):
        raise VramplanError(f"diffusers {diffusers.__version__} has no {plan.model.class_name}")
    given = class_call_arguments(cls, plan, PROMPT)
    for setting in decodes:
        if isinstance(setting, DecodeChunkSize):
            given["decode_chunk_size"] = setting.frames
    needed = (item for item in call_parameters(cls).values() if item.default is item.empty and item.name != "self")
    named = (item.name for item in needed if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY))
    return {name: ... for name in named if name not in given} | given


def _title(plan: Plan) -> str:
    budget = plan.machine.budget
    limit = "" if budget.vram_bytes is None else f" within {format_bytes(budget.vram_bytes)}"
    return f"# {plan.model.class_name}{limit}: {' '.join(plan.reason.split())}"


def _script(plan: Plan) -> Script:
    from vramplan.planfile.match import parse_settings
    from vramplan.planfile.script import Script

    _check_identifiers(plan)
    placed, decodes = parse_settings(plan, None, plan.machine.accelerator)
    source, vaes = _load_source(plan)
    encoded = _encode_weightless(plan, placed)
    return Script(plan=plan, source=source, placed=placed, decodes=decodes, vaes=vaes, encoded=encoded)


def _encode_weightless(plan: Plan, placed: Placed) -> Encoded | None:
    """Arguments and results of encoding the prompt, from a pipeline without weights; None if not encoded first."""
    from vramplan.pipeline.describe import describe
    from vramplan.planfile.script import PROMPT
    from vramplan.planfile.types import load_options
    from vramplan.simulator.model import SimulatedModel
    from vramplan.simulator.run import run_encode
    from vramplan.strategies.base import freed_first

    first = [name for _, names in freed_first(placed)[0] for name in names]
    if not first:
        return None
    spec = describe(plan.model.origin, **load_options(plan)).spec
    return run_encode(SimulatedModel(spec).parts, lambda pipe: call_arguments(pipe, plan, PROMPT), first)


def _load_source(plan: Plan) -> tuple[Source, dict[str, Any]]:
    """Return the source to load the pipeline from, and its VAEs without weights, whose tile attributes the code names.

    Raises:
        UsageError: the plan was made from a live pipeline; the calls are then on the applied plan's `calls`.
    """
    from vramplan.pipeline.build import build_weightless
    from vramplan.pipeline.folder import read_config, read_index
    from vramplan.pipeline.hub import open_repository
    from vramplan.planfile.match import vae_names
    from vramplan.profiles.catalogue import load_pipeline_profile

    source = plan.model.origin
    names = vae_names(plan) if plan.settings.decode else []
    if isinstance(source, Live):
        raise UsageError("the plan was made from a live pipeline: its calls are on vramplan.apply_plan(...).calls")
    if isinstance(source, Profile):
        profile = load_pipeline_profile(source.name)
        parts = {name: profile.components[name] for name in names}
        return Hub(profile.repos[0]), {
            name: build_weightless(part.library, part.class_name, part.config) for name, part in parts.items()
        }
    if not names:
        return source, {}
    assert isinstance(source, Folder | Hub), f"a plan of {source} names its profile"
    repository = open_repository(source)
    index = read_index(repository)
    return source, {
        name: build_weightless(index[name][0], index[name][1], read_config(repository, name)) for name in names
    }


def _check_identifiers(plan: Plan) -> None:
    """Raise VramplanError if a name in the plan is not a Python identifier and could become other code."""
    names = [
        plan.model.class_name,
        *(name for record in plan.model.components for name in (record.class_name, record.library)),
        *(name for row in AXES.values() if row.by_component for name in getattr(plan.settings, row.name)),
        plan.machine.device.replace(":", "_"),
    ]
    names += [name for record in plan.model.components for name in (record.name, record.dtype, record.library)]
    for name in names:
        if not name.isidentifier():
            raise VramplanError(f"the plan names {name!r}, which cannot stand in Python code")
