"""Options shared by several commands."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from vramplan.cli.arguments import check_device, check_size

Command = TypeVar("Command", bound=Callable[..., Any])
FORMATS = ("auto", "human", "json", "yaml")


class Option(click.Option):
    """An option whose environment variable is named after the flag (`VRAMPLAN_PLAN_SET`), not the Python argument."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """The value of the environment variable; None if it is unset or empty."""
        suffix = max(self.opts, key=len).lstrip("-").replace("-", "_").upper()
        return os.environ.get(f"{ctx.auto_envvar_prefix}_{suffix}") or None


def combine_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Combine several options into one decorator, in the order of the help."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


FORMAT_HELP = "How to print."
json_option = click.option("--json", "as_json", cls=Option, is_flag=True, help="Short for --format json.")
format_options = combine_options(
    click.option("--format", "form", cls=Option, type=click.Choice(FORMATS), default="auto", help=FORMAT_HELP),
    json_option,
)
machine_options = combine_options(
    click.option(
        "--device",
        callback=check_device,
        help="cpu, a device here (cuda:1), a device profile (rtx-4070), or a hardware.yaml.",
    ),
    click.option("--vram", callback=check_size, help="VRAM that may be used: 12GiB, -1GiB (free less one), 85%."),
    click.option("--ram", callback=check_size, help="RAM that may be used, likewise."),
    click.option("--margin", callback=check_size, help="VRAM kept free on purpose."),
)
workload_options = combine_options(
    click.option("--height", type=int, help="Pixels."),
    click.option("--width", type=int, help="Pixels."),
    click.option("--frames", type=int, help="Frames of a video."),
    click.option("--batch", type=int, help="Pictures per prompt."),
    click.option("--steps", type=int, help="Denoising steps."),
)
loading_options = combine_options(
    click.option("--dtype", help="Load in float32, float16 or bfloat16 instead of the stored dtype."),
    click.option("--variant", help="Load the weight files of this variant, as fp16."),
    click.option("--revision", help="A branch, tag or commit of a hub repository; its main branch where left out."),
    click.option("--allow-pickle", is_flag=True, help="Accept pickled weights. Only from people you trust."),
)
_ALLOW = (
    "The least faithful setting that may be chosen. Left out: lossless, and VAE tiling where nothing lossless fits."
)
choice_options = combine_options(
    click.option("--allow", type=click.Choice(("lossless", "near_lossless", "lossy")), help=_ALLOW),
    click.option("--prefer", type=click.Choice(("speed", "memory")), default="speed", show_default=True),
    click.option(
        "--stock", is_flag=True, help="Only settings of diffusers and accelerate, whose code needs no vramplan."
    ),
)
plot_option = click.option(
    "--plot", cls=Option, type=click.Path(dir_okay=False), help="Draw it too: a name in .svg, .png or .html."
)
set_option = click.option(
    "--set", "fixed", cls=Option, multiple=True, metavar="AXIS[.COMPONENT]=SETTING", help="Fix a choice by hand."
)
