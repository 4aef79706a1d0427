"""The source of a pipeline is a type: read from what a user gives and from a plan file, and written back as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from vramplan.errors import UsageError
from vramplan.pipeline.sources import Folder, Hub, Live, Profile, SingleFile, parse_source, source_of

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    "source", [Live(), Folder(Path("/models/flux")), Hub("owner/name", COMMIT), Profile("flux.1-dev")]
)
def test_a_plan_keeps_it_as_text(source) -> None:
    assert parse_source(str(source)) == source


@pytest.mark.parametrize(
    ("given", "source"),
    [
        ("flux.1-dev", Profile("flux.1-dev")),
        ("owner/name", Hub("owner/name")),
        (f"hub:owner/name@{COMMIT}", Hub("owner/name", COMMIT)),
        ("./somewhere", Folder(Path("somewhere"))),
        ("~/pipeline", Folder(Path("~/pipeline").expanduser())),
        ("a.safetensors", SingleFile("a.safetensors")),
        ("owner/name/a.safetensors", SingleFile("owner/name/a.safetensors")),
        (Profile("sana"), Profile("sana")),
    ],
)
def test_what_a_user_gives(given, source) -> None:
    assert source_of(given) == source


def test_a_folder_that_exists_comes_before_a_repository_of_that_name(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert source_of("owner/name") == Folder(Path("owner/name"))


def test_a_live_pipeline_is_held_but_not_compared() -> None:
    pipe = object()
    assert source_of(pipe).pipe is pipe
    assert source_of(pipe) == Live()


@pytest.mark.parametrize("given", [object(), ".", "flux.1-dev", f"hub:owner/name@{COMMIT}"])
def test_only_a_repository_has_revisions(given) -> None:
    assert source_of("owner/name", "main") == Hub("owner/name", "main")
    with pytest.raises(UsageError, match=r"revision main: .* has none to choose from"):
        source_of(given, "main")


@pytest.mark.parametrize("text", ["hub:owner/name", "hub:name@main", "hub:@main"])
def test_a_hub_source_without_repository_or_commit_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write hub:owner/name@revision"):
        parse_source(text)
