"""The command line: parse, call, report. Data goes to stdout, talk to stderr."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.exceptions import NoArgsIsHelpError

from vramplan._version import __version__
from vramplan.errors import MismatchError, NothingFitsError, UsageError, VramplanError
from vramplan.options import (
    FORMAT_HELP,
    FORMATS,
    Command,
    Option,
    choice_options,
    format_options,
    json_option,
    load_options,
    machine_options,
    plot_option,
    set_option,
    workload_options,
)

if TYPE_CHECKING:
    from rich.console import RenderableType


_VERBOSE = "Show the libraries' own messages."
_QUIET = "No talk on stderr but errors."
_SAMPLE = "Also run a pipeline of 2 GiB of random weights, projected against measured."


def _talk(context: click.Context, option: click.Parameter, given: bool) -> None:
    """-v and -q wherever they stand; set before diffusers and transformers are imported."""
    told = context.find_root().ensure_object(dict)
    told[option.name] = told.get(option.name, False) or given
    if option.name == "verbose" and not told["verbose"]:
        # Their warnings are about their own interfaces, not about the plan.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        warnings.simplefilter("ignore", FutureWarning)
    elif option.name == "verbose":
        for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
            os.environ.pop(name, None)
        warnings.simplefilter("default", FutureWarning)


class _Group(click.Group):
    """Turns every failure into one line and the documented exit code."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Every command takes -v and -q, before its own name or after it."""
        super().add_command(cmd, name)
        cmd.params += [
            click.Option(["-v", "--verbose"], is_flag=True, expose_value=False, callback=_talk, help=_VERBOSE),
            click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=_talk, help=_QUIET),
        ]

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            return super().main(*args, **kwargs)
        except NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help() if error.ctx else error.format_message(), err=True)
            sys.exit(2)
        except click.ClickException as error:
            _fail(f"{error.format_message()}", 2, error)
        except click.Abort as error:
            _fail("interrupted", 130, error)
        except VramplanError as error:
            _fail(str(error), error.exit_code, error)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(0)
        except Exception as error:
            _fail(f"{type(error).__name__}: {' '.join(str(error).split())}", 1, error)


def _fail(message: str, code: int, error: BaseException) -> None:
    if os.environ.get("VRAMPLAN_DEBUG"):
        traceback.print_exception(error)
    click.echo(f"vramplan: {message}", err=True)
    sys.exit(code)


def _pass_told(command: Command) -> Command:
    """Hand the command what -v and -q said."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return command(click.get_current_context().find_root().ensure_object(dict), *args, **kwargs)

    return update_wrapper(call, command)  # type: ignore[return-value]


@click.group(cls=_Group, context_settings={"auto_envvar_prefix": "VRAMPLAN", "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vramplan")
@click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_talk, help=_VERBOSE)
@click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_talk, help=_QUIET)
def main() -> None:
    """Plan, apply and check the memory settings of a diffusers pipeline.

    Exit codes: 0 done, 1 error, 2 usage, 3 nothing fits, 4 the plan does not match this machine or pipeline.
    """


@main.command()
@machine_options
@click.option(
    "--format", "form", cls=Option, type=click.Choice((*FORMATS, "markdown")), default="auto", help=FORMAT_HELP
)
@json_option
@click.option("--measure", is_flag=True, help="Measure copies, disk and products too. Loads torch; takes seconds once.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write it as YAML to a file, for --device.")
def detect(form: str, as_json: bool, measure: bool, output: str | None, **machine: str | None) -> None:
    """Say what this machine has and what may be used of it.

    --format markdown makes a block for a bug report, without names and identifiers.
    """
    from vramplan.machine import choose_machine, known_budget, measure_here
    from vramplan.report import to_yaml
    from vramplan.report_machine import hardware_dict, hardware_markdown, hardware_view

    hardware, accelerator = choose_machine(machine["device"])
    if measure:
        hardware = measure_here(hardware, accelerator, machine["device"])
    machine.pop("device")
    budget, full = None, None
    try:
        budget = known_budget(hardware, accelerator, machine)
    except UsageError as error:
        if any(machine.values()):
            raise
        full = error  # a machine with nothing left is still to be shown: who uses it is what one wants to know
    content = hardware_dict(hardware, budget)
    if output:
        _write(output, to_yaml(content) + "\n")
    if form == "markdown":
        click.echo(hardware_markdown(hardware, budget))
    else:
        _print(content, lambda: hardware_view(hardware, budget), form, as_json=as_json)
    if full is not None:
        raise full


@main.command()
@click.argument("model")
@machine_options
@workload_options
@load_options
@choice_options
@set_option
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write the plan to this file.")
@format_options
@_pass_told
def plan(obj: Mapping[str, bool], /, *, model: str, fixed: tuple[str, ...], output: str | None, **given: Any) -> None:
    """Choose the settings for MODEL: a pipeline folder, a repository of the hub (owner/name), or a bundled profile.

    Of a repository only configurations and safetensors headers are read, no weight; gated and private ones with the
    token of `hf auth login` or HF_TOKEN.
    """
    from vramplan.planfile import dump_plan, plan_to_dict
    from vramplan.planning import plan as make_plan
    from vramplan.report import plan_view

    form, as_json = given.pop("form"), given.pop("as_json")
    made = make_plan(model, settings=_fixed(fixed), **given)
    if output:
        _write(output, dump_plan(made))
        if not obj["quiet"]:
            click.echo(f"wrote {output}", err=True)
    _print(plan_to_dict(made), lambda: plan_view(made), form, as_json=as_json, yaml=lambda: dump_plan(made).rstrip())


@main.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL [MODEL ...]")
@click.option(
    "--largest",
    type=click.Choice(("size", "frames", "batch")),
    help="Look for the largest picture of that shape, frame count or number of pictures per prompt.",
)
@machine_options
@workload_options
@load_options
@choice_options
@set_option
@format_options
@_pass_told
def fit(
    obj: Mapping[str, bool],
    /,
    *,
    models: tuple[str, ...],
    fixed: tuple[str, ...],
    form: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Say which cards run MODEL, or with --device or --vram which of several models that card runs and how.

    With --largest: how much of it. Exit code 3 where nothing fits.
    """
    from vramplan.fitting import fit as find
    from vramplan.progress import hide_bars
    from vramplan.report_fit import fits_dict

    if obj["quiet"]:
        hide_bars()
    found = find(models, settings=_fixed(fixed), **given)
    _print(fits_dict(found), lambda: str(found), form, as_json=as_json)
    if not found.fits:
        raise NothingFitsError("nothing fits" if len(found.rows) > 1 else found.rows[0].reason)


@main.command()
@click.argument("plan_file", type=click.Path())
@plot_option
@format_options
@_pass_told
def explain(obj: Mapping[str, bool], /, plan_file: str, plot: str | None, form: str, *, as_json: bool) -> None:
    """List every candidate of a plan: it fits, or is short by how much and where."""
    from vramplan.planfile import load_plan, plan_to_dict
    from vramplan.plot.save import check_picture
    from vramplan.report import explain_view

    if plot:
        check_picture(plot)
    loaded = load_plan(plan_file)
    if plot:
        _draw(plot, loaded, quiet=obj["quiet"])
    content = plan_to_dict(loaded)
    shown = {key: content[key] for key in ("schema_version", "settings", "reason", "notes", "refused", "candidates")}
    _print(shown, lambda: explain_view(loaded), form, as_json=as_json)


@main.command()
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
@_pass_told
def apply(obj: Mapping[str, bool], /, plan_file: str, output: str | None, *, replan: bool, **given: Any) -> None:
    """Load the plan's pipeline, apply the plan, generate with --prompt, and print projected against measured."""
    from vramplan.drift import current_plan
    from vramplan.generate import check_output, run_plan
    from vramplan.planfile import load_plan

    if output and not given["prompt"]:
        raise UsageError("--output needs --prompt: there is nothing to write without generating")
    loaded = load_plan(plan_file)
    if output:
        check_output(output, loaded)
    say = (lambda text: None) if obj["quiet"] else (lambda text: click.echo(text, err=True))
    current = current_plan(loaded, given["model"], replan=replan, allow_pickle=given["allow_pickle"], say=say)
    click.echo(run_plan(current, output=output, bars=not obj["quiet"], say=say, **given))


@main.command()
@click.argument("model")
@machine_options
@workload_options
@load_options
@set_option
@plot_option
@format_options
@_pass_told
def simulate(
    obj: Mapping[str, bool], /, *, model: str, plot: str | None, form: str, as_json: bool, **given: Any
) -> None:
    """Run a whole call on an accelerator that is not there. MODEL is a plan file, or what `plan` takes.

    Prints the memory by phase, and the module and operation that made each peak. Exit code 3 if it does not fit.
    """
    from vramplan.plot.save import check_picture
    from vramplan.report import simulation_dict, simulation_view
    from vramplan.simulating import simulate_model, simulate_plan

    if plot:
        check_picture(plot)
    given["settings"] = _fixed(given.pop("fixed"))
    if Path(model).is_file():
        _refuse_beside_plan(given)
        result = simulate_plan(model, timeline=bool(plot))
    else:
        result = simulate_model(model, timeline=bool(plot), **given)
    if plot:
        _draw(plot, result, quiet=obj["quiet"])
    _print(simulation_dict(result), lambda: simulation_view(result), form, as_json=as_json)
    if result.fits is False:
        raise NothingFitsError(result.stopped or "it does not fit")


def _refuse_beside_plan(given: Mapping[str, Any]) -> None:
    told = [name for name, value in given.items() if value]
    if told:
        raise UsageError(f"--{told[0].replace('_', '-')}: a plan file says that already; edit it or plan again")


@main.command()
@click.argument("plan_file", type=click.Path())
def check(plan_file: str) -> None:
    """Say whether a plan would still fit this machine now. Exit code 4 if not."""
    from vramplan.drift import drift_of
    from vramplan.planfile import load_plan

    found = drift_of(load_plan(plan_file))
    if found.broken is not None:
        raise MismatchError(found.broken)
    click.echo("\n".join([found.sentence, *(f"changed since it was planned: {text}" for text in found.changes)]))


@main.command()
@click.option("--device", help="A device of this machine (cuda:1); the first one where left out.")
@click.option("--pipeline/--no-pipeline", default=True, show_default=True, help=_SAMPLE)
@format_options
@_pass_told
def calibrate(obj: Mapping[str, bool], /, device: str | None, form: str, *, pipeline: bool, as_json: bool) -> None:
    """Measure this machine's accelerator, and keep what is found for the plans to come."""
    from vramplan.calibration.calibrate import calibrate as measure
    from vramplan.report import probe_dict, probe_text

    say = (lambda text: None) if obj["quiet"] else (lambda text: click.echo(text, err=True))
    record = measure(device, pipeline=pipeline, say=say)
    _print(probe_dict(record), lambda: probe_text(record), form, as_json=as_json)


@main.command()
@click.argument("plan_file", type=click.Path())
def code(plan_file: str) -> None:
    """Print the plan as plain diffusers calls, to paste."""
    from vramplan.generate import plan_code
    from vramplan.planfile import load_plan

    click.echo(plan_code(load_plan(plan_file)))


@main.group()
def profiles() -> None:
    """The facts about pipelines and devices: bundled ones, and your own, which win."""


@profiles.command("list")
def list_profiles() -> None:
    """Name every profile; yours are marked."""
    from vramplan.profiles import device_names, own_profiles, pipeline_names
    from vramplan.report import profiles_text

    names = {"pipelines": pipeline_names(), "devices": device_names()}
    own = {"pipelines": own_profiles("pipelines"), "devices": own_profiles("devices")}
    click.echo(profiles_text(names, own))


@profiles.command("show")
@click.argument("name")
def show_profile(name: str) -> None:
    """Print a profile, sources included."""
    from vramplan.profile_files import ProfileKind
    from vramplan.profiles import device_names, profile_path

    kind: ProfileKind = "devices" if name.casefold() in map(str.casefold, device_names()) else "pipelines"
    click.echo(profile_path(kind, name).read_text(encoding="utf-8").rstrip())


@profiles.command("check")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def check_profile_file(file: Path) -> None:
    """Say what is wrong with a profile you wrote, a line for each mistake. Exit code 2 if anything is."""
    from vramplan.profiles import check_profile

    kind, found = check_profile(file)
    if found:
        click.echo("\n".join(found))
        raise UsageError(f"{file}: {len(found)} mistake{'s' if len(found) > 1 else ''}, listed above: correct the file")
    click.echo(f"{file}: a {kind.removesuffix('s')} profile that can be used")


def _fixed(texts: tuple[str, ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            raise UsageError(f"--set {text}: write AXIS=SETTING, as in --set placement=resident")
        found.setdefault(key.strip(), []).append(value.strip())
    return found


def _print(
    content: Any,
    human: Callable[[], RenderableType],
    form: str,
    *,
    as_json: bool = False,
    yaml: Callable[[], str] | None = None,
) -> None:
    from vramplan.report import to_json, to_yaml

    if as_json or form == "json":
        click.echo(to_json(content))
    elif form == "yaml":
        click.echo(yaml() if yaml else to_yaml(content))
    else:
        from vramplan.terminal import show

        show(human())


def _draw(path: str, shown: Any, *, quiet: bool) -> None:
    from vramplan.plot.save import save_picture

    save_picture(path, shown)
    if not quiet:
        click.echo(f"wrote {path}", err=True)


def _write(path: str, text: str) -> None:
    from vramplan.files import write_text

    if not Path(path).parent.is_dir():
        raise UsageError(f"--output {path}: its folder does not exist")
    write_text(path, text)
