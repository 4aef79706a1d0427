"""The command line: parse, call, report. Data goes to stdout, messages to stderr."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import traceback
import warnings
from contextlib import suppress
from typing import Any

import click
from click.exceptions import NoArgsIsHelpError

from vramplan._version import __version__
from vramplan.cli.machine import calibrate, detect
from vramplan.cli.plans import check, code, explain, fit, plan
from vramplan.cli.profiles import profiles
from vramplan.cli.running import apply, simulate
from vramplan.cli.shared import spell_flags
from vramplan.cli.ui import ui
from vramplan.common.progress import CHATTY_LOGGERS
from vramplan.errors import VramplanError

_VERBOSE = "Show the libraries' own messages."
_QUIET = "No talk on stderr but errors."


def _set_verbosity(context: click.Context, option: click.Parameter, given: bool) -> None:
    """Apply -v and -q at any position, before diffusers and transformers are imported."""
    flags = context.find_root().ensure_object(dict)
    flags[option.name] = flags.get(option.name, False) or given
    if option.name == "verbose" and not flags["verbose"]:
        # Their warnings concern their own interfaces, not the plan.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        warnings.simplefilter("ignore", FutureWarning)
        _set_library_level(logging.ERROR)
    elif option.name == "verbose":
        for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
            os.environ.pop(name, None)
        warnings.simplefilter("default", FutureWarning)
        _set_library_level(logging.NOTSET)


def _set_library_level(level: int) -> None:
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(level)


class _Group(click.Group):
    """A group that turns every failure into one line and the documented exit code."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command with the options -v and -q, which may stand before or after its name."""
        super().add_command(cmd, name)
        cmd.params += [
            click.Option(["-v", "--verbose"], is_flag=True, expose_value=False, callback=_set_verbosity, help=_VERBOSE),
            click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=_set_verbosity, help=_QUIET),
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
            _fail(spell_flags(str(error), self), error.exit_code, error)
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


@click.group(cls=_Group, context_settings={"auto_envvar_prefix": "VRAMPLAN", "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vramplan")
@click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_set_verbosity, help=_VERBOSE)
@click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_set_verbosity, help=_QUIET)
def main() -> None:
    """Plan, apply and check the memory settings of a diffusers pipeline.

    Exit codes: 0 done, 1 error, 2 usage, 3 nothing fits, 4 the plan does not match this machine or pipeline.
    """


for _command in (detect, plan, fit, explain, apply, simulate, check, calibrate, code, ui, profiles):
    main.add_command(_command)


def run() -> None:
    """The command of this name: `main`, then what is registered for the exit, and an end without tearing down torch."""
    code: Any = 0
    try:
        main(prog_name="vramplan")
    except SystemExit as exit_:
        code = exit_.code
    if not isinstance(code, int):
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
