"""Commands that run a plan: apply on a real pipeline, simulate on a simulated accelerator."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import click

from vramplan.cli.arguments import check_model
from vramplan.cli.options import (
    format_options,
    loading_options,
    machine_options,
    plot_option,
    set_option,
    workload_options,
)
from vramplan.cli.shared import is_quiet, parse_set_options, save_plot, say, show_result, spell_flags
from vramplan.errors import NothingFitsError, UsageError


@click.command()
@click.argument("plan_file", type=click.Path())
@click.option("--model", type=click.Path(file_okay=False), help="The pipeline's folder, if it is not where it was.")
@click.option("--prompt", help="Generate from this text once the plan is applied.")
@click.option("--negative-prompt", help="What the picture should not show.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the picture or video to this file.")
@click.option("--allow-pickle", is_flag=True, help="Load pickled weights. Only from people you trust.")
@click.option(
    "--recover/--no-recover",
    default=True,
    show_default=True,
    help="Where memory runs out, make the call again under a smaller plan.",
)
@click.option("--replan", is_flag=True, help="Where the plan no longer fits, make another for the same wishes.")
def apply(plan_file: str, output: str | None, *, replan: bool, **given: Any) -> None:
    """Load the plan's pipeline, apply the plan, generate with --prompt, and print projected against measured."""
    from vramplan.api.check import current_plan, described_folder
    from vramplan.api.run import run_plan
    from vramplan.planfile.file import load_plan
    from vramplan.runtime.output import check_output
    from vramplan.view.run import apply_view
    from vramplan.view.terminal import show

    if output and not given["prompt"]:
        raise UsageError("--output needs --prompt: there is nothing to write without generating")
    loaded = load_plan(plan_file)
    if output:
        check_output(output, loaded)
    model, allow_pickle = given["model"], given["allow_pickle"]
    folder = cache(partial(described_folder, loaded, model, allow_pickle=allow_pickle))
    current = current_plan(loaded, model, describe_folder=folder, replan=replan, allow_pickle=allow_pickle, say=say)
    ran = run_plan(current, described=folder(), output=output, bars=not is_quiet(), say=say, **given)
    show(apply_view(spell_flags(ran)))


@click.command()
@click.argument("model", callback=check_model)
@machine_options
@workload_options
@loading_options
@set_option
@plot_option
@format_options
def simulate(*, model: str, plot: str | None, form: str, as_json: bool, **given: Any) -> None:
    """Run a whole call on an accelerator that is not there. MODEL is a plan file, or what `plan` takes.

    Prints the memory by phase, and the module and operation that made each peak. Exit code 3 if it does not fit.
    """
    from vramplan.api.request import make_request
    from vramplan.api.simulate import simulate_model, simulate_plan
    from vramplan.planfile.file import load_plan
    from vramplan.view.plot.save import check_picture
    from vramplan.view.simulation import simulation_dict, simulation_view

    if plot:
        check_picture(plot)
    given["settings"] = parse_set_options(given.pop("fixed"))
    if Path(model).is_file():
        argument = next((name for name, value in given.items() if value), None)
        if argument is not None:
            raise UsageError(f"`{argument}`: a plan file says that already; edit it or plan again")
        result = simulate_plan(model, timeline=bool(plot))
    else:
        result = simulate_model(model, make_request(given), timeline=bool(plot))
    if plot:
        save_plot(plot, result, load_plan(model) if Path(model).is_file() else None)
    show_result(simulation_dict(result), lambda: simulation_view(spell_flags(result)), form, as_json=as_json)
    if result.fits is False:
        raise NothingFitsError(result.stopped or "it does not fit")
