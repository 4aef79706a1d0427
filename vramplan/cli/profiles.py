"""Commands on profiles of pipelines and devices: profiles list, show, check."""

from __future__ import annotations

from pathlib import Path

import click

from vramplan.errors import UsageError


@click.group()
def profiles() -> None:
    """The facts about pipelines and devices: bundled ones, and your own, which win."""


@profiles.command("list")
def list_profiles() -> None:
    """Name every profile; yours are marked."""
    from vramplan.profiles.catalogue import device_names, pipeline_names, user_profiles
    from vramplan.view.shared import profiles_text

    names = {"pipelines": pipeline_names(), "devices": device_names()}
    own = {"pipelines": user_profiles("pipelines"), "devices": user_profiles("devices")}
    click.echo(profiles_text(names, own))


@profiles.command("show")
@click.argument("name")
def show_profile(name: str) -> None:
    """Print a profile, sources included."""
    from vramplan.profiles.catalogue import device_names
    from vramplan.profiles.files import ProfileKind
    from vramplan.profiles.names import profile_path

    kind: ProfileKind = "devices" if name.casefold() in map(str.casefold, device_names()) else "pipelines"
    click.echo(profile_path(kind, name).read_text(encoding="utf-8").rstrip())


@profiles.command("check")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def check_profile_file(file: Path) -> None:
    """Say what is wrong with a profile you wrote, a line for each mistake. Exit code 2 if anything is."""
    from vramplan.pipeline.bundled import check_profile

    kind, found = check_profile(file)
    if found:
        click.echo("\n".join(found))
        raise UsageError(f"{file}: {len(found)} mistake{'s' if len(found) > 1 else ''}, listed above: correct the file")
    click.echo(f"{file}: a {kind.removesuffix('s')} profile that can be used")
