"""Commands that make and read plans: plan, fit, explain, check, code."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from vramplan.cli.arguments import check_folder, check_model
from vramplan.cli.options import (
    choice_options,
    format_options,
    loading_options,
    machine_options,
    plot_option,
    set_option,
    workload_options,
)
from vramplan.cli.shared import is_quiet, parse_set_options, save_plot, show_result, spell_flags, write_file
from vramplan.errors import MismatchError, NothingFitsError

_EXPLAINED = ("schema_version", "settings", "reason", "notes", "refused", "stock", "candidates")


@click.command()
@click.argument("model", callback=check_model)
@machine_options
@workload_options
@loading_options
@choice_options
@set_option
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), callback=check_folder, help="Write the plan to this file."
)
@format_options
def plan(*, model: str, fixed: tuple[str, ...], output: str | None, **given: Any) -> None:
    """Choose the settings for MODEL: a pipeline folder, a repository of the hub (owner/name), or a bundled profile.

    Of a repository only configurations and safetensors headers are read, no weight; gated and private ones with the
    token of `hf auth login` or HF_TOKEN.
    """
    from vramplan.api.plan import plan as make_plan
    from vramplan.api.request import make_request
    from vramplan.planfile.file import dump_plan, plan_to_dict
    from vramplan.view.plan import plan_view

    form, as_json = given.pop("form"), given.pop("as_json")
    made = make_plan(model, make_request({"settings": parse_set_options(fixed), **given}))
    if output:
        write_file(output, dump_plan(made))
    yaml = partial(dump_plan, made)
    show_result(plan_to_dict(made), lambda: plan_view(spell_flags(made)), form, as_json=as_json, yaml=yaml)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL [MODEL ...]", callback=check_model)
@click.option(
    "--largest",
    type=click.Choice(("size", "frames", "batch")),
    help="Look for the largest picture of that shape, frame count or number of pictures per prompt.",
)
@machine_options
@workload_options
@loading_options
@choice_options
@set_option
@format_options
def fit(*, models: tuple[str, ...], fixed: tuple[str, ...], form: str, as_json: bool, **given: Any) -> None:
    """Say which cards run MODEL, or with --device or --vram which of several models that card runs and how.

    With --largest: how much of it. Exit code 3 where nothing fits.
    """
    from vramplan.api.fit import fit as find
    from vramplan.api.request import make_request
    from vramplan.common.progress import hide_bars
    from vramplan.view.fits import fits_dict, fits_view

    if is_quiet():
        hide_bars()
    largest = given.pop("largest")
    found = find(models, make_request({"settings": parse_set_options(fixed), **given}), largest=largest)
    show_result(fits_dict(found), lambda: fits_view(spell_flags(found)), form, as_json=as_json)
    if not found.fits:
        raise NothingFitsError("nothing fits" if len(found.rows) > 1 else found.rows[0].reason)


@click.command()
@click.argument("plan_file", type=click.Path())
@plot_option
@format_options
def explain(plan_file: str, plot: str | None, form: str, *, as_json: bool) -> None:
    """List every candidate of a plan: it fits, or is short by how much and where."""
    from vramplan.planfile.file import load_plan, plan_to_dict
    from vramplan.view.plan import explain_view
    from vramplan.view.plot.save import check_picture

    if plot:
        check_picture(plot)
    loaded = load_plan(plan_file)
    if plot:
        save_plot(plot, loaded, loaded)
    content = plan_to_dict(loaded)
    shown = {key: content[key] for key in _EXPLAINED}
    show_result(shown, lambda: explain_view(spell_flags(loaded)), form, as_json=as_json)


@click.command()
@click.argument("plan_file", type=click.Path())
def check(plan_file: str) -> None:
    """Say whether a plan would still fit this machine now. Exit code 4 if not."""
    from vramplan.api.check import drift_of
    from vramplan.planfile.file import load_plan

    found = drift_of(load_plan(plan_file))
    if found.broken is not None:
        raise MismatchError(found.broken)
    click.echo("\n".join([found.sentence, *(f"changed since it was planned: {text}" for text in found.changes)]))


@click.command()
@click.argument("plan_file", type=click.Path())
@click.option(
    "--stock", is_flag=True, help="The fastest that needs no vramplan, with the call. Exit code 3 if none fits."
)
def code(plan_file: str, *, stock: bool) -> None:
    """Print the plan as plain diffusers calls, to paste."""
    from vramplan.api.code import plan_code, stock_code
    from vramplan.planfile.file import load_plan

    loaded = load_plan(plan_file)
    click.echo(stock_code(loaded) if stock else plan_code(loaded))
