"""Commands on this machine: detect, calibrate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vramplan.cli.options import FORMAT_HELP, FORMATS, Option, format_options, json_option, machine_options
from vramplan.cli.shared import say, show_result, spell_flags, write_file
from vramplan.errors import NothingFitsError

if TYPE_CHECKING:
    from vramplan.calibration.peaks import Measured
    from vramplan.planfile.types import Plan

_MEASURE = "Measure copies, disk, products, attention and launches too. Loads torch; takes seconds once."
_SAMPLE = "Also run a pipeline of 2 GiB of random weights, projected against measured."

_EXPORT = "Write this and what calls under plans have measured as YAML, to send to vramplan: no names, no paths."


@click.command()
@machine_options
@click.option(
    "--format", "form", cls=Option, type=click.Choice((*FORMATS, "markdown")), default="auto", help=FORMAT_HELP
)
@json_option
@click.option("--measure", is_flag=True, help=_MEASURE)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write it as YAML to a file, for --device.")
def detect(
    device: str | None, form: str, as_json: bool, measure: bool, output: str | None, **machine: str | None
) -> None:
    """Say what this machine has and what may be used of it.

    --format markdown makes a block for a bug report, without names and identifiers.
    """
    from vramplan.api.machine import find_machine, known_budget, measure_here
    from vramplan.view.machine import hardware_dict, hardware_markdown, hardware_view
    from vramplan.view.shared import to_yaml

    hardware, accelerator = find_machine(device)
    if measure:
        hardware = measure_here(hardware, accelerator, device)
    budget, full = None, None
    try:
        budget = known_budget(hardware, accelerator, machine)
    except NothingFitsError as error:
        full = error  # show a full machine too: the user wants to see which programs use its memory
    content = hardware_dict(hardware, budget)
    if output:
        write_file(output, to_yaml(content) + "\n")
    hardware, budget = spell_flags((hardware, budget))
    if form == "markdown":
        click.echo(hardware_markdown(hardware, budget))
    else:
        show_result(content, lambda: hardware_view(hardware, budget), form, as_json=as_json)
    if full is not None:
        raise full


@click.command()
@click.option("--device", help="A device of this machine (cuda:1); the first one where left out.")
@click.option("--pipeline/--no-pipeline", default=True, show_default=True, help=_SAMPLE)
@click.option("--export", "exported", type=click.Path(dir_okay=False), help=_EXPORT)
@format_options
def calibrate(device: str | None, form: str, exported: str | None, *, pipeline: bool, as_json: bool) -> None:
    """Measure this machine's accelerator, and keep what is found for the plans to come."""
    from vramplan.api.calibrate import calibrate as measure
    from vramplan.api.calibrate import export_measurements
    from vramplan.planfile.types import settings_text
    from vramplan.view.machine import probe_dict, probe_text
    from vramplan.view.run import measured_text
    from vramplan.view.shared import to_yaml

    def report(plan: Plan, measured: Measured) -> None:
        say(f"{settings_text(plan.settings)}\n{measured_text(plan, measured)}")

    record = measure(device, pipeline=pipeline, say=say, report=report)
    if exported:
        write_file(exported, to_yaml(export_measurements()) + "\n", "--export")
    show_result(probe_dict(record), lambda: probe_text(record), form, as_json=as_json)
