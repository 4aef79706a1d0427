"""Profiles that the user wrote: they win, and a broken one is told of without being in the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from vramplan.cli.main import main
from vramplan.errors import UsageError, VramplanError
from vramplan.pipeline.bundled import check_profile
from vramplan.profiles.catalogue import (
    device_names,
    load_device_profile,
    load_pipeline_profile,
    rates_for,
)
from vramplan.profiles.files import user_directory
from vramplan.profiles.names import profile_path

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`write("devices", "mine", like="rtx-4090", title="Mine")`: a file of the user's, that one with changes."""
    monkeypatch.setenv("VRAMPLAN_PROFILES", str(tmp_path))

    def write(kind: Any, name: str, /, *, like: str, **changes: Any) -> Path:
        document = yaml.safe_load(profile_path(kind, like).read_text(encoding="utf-8"))
        document |= {"name": name} | changes
        return save(tmp_path / kind / f"{name}.yaml", yaml.safe_dump(document, sort_keys=False))

    return write


def save(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_they_lie_where_the_platform_keeps_what_users_configure(monkeypatch: pytest.MonkeyPatch) -> None:
    platformdirs = pytest.importorskip("platformdirs")
    monkeypatch.delenv("VRAMPLAN_PROFILES")
    assert user_directory() == platformdirs.user_config_path("vramplan") / "profiles"


def test_a_device_of_the_users_is_known_by_name_and_by_its_driver(write: Write) -> None:
    write("devices", "mine", like="rtx-4090", match=["My Card"], memory_gb_per_s=123.0)
    assert "mine" in device_names()
    assert load_device_profile("MINE").memory_gb_per_s == 123.0
    rates = rates_for("my card")
    assert rates is not None
    assert rates.memory_bytes_per_s == pytest.approx(123e9)


def test_it_wins_over_the_bundled_one_of_the_same_name(write: Write) -> None:
    write("devices", "RTX-4090", like="rtx-4090", memory_gb_per_s=77.0)
    assert load_device_profile("rtx-4090").memory_gb_per_s == 77.0
    assert [name for name in device_names() if name.casefold() == "rtx-4090"] == ["RTX-4090"]


def test_it_wins_where_the_driver_calls_both_the_same(write: Write) -> None:
    write("devices", "mine", like="rtx-4090", memory_bytes=1 << 30, memory_gb_per_s=77.0)
    rates = rates_for("NVIDIA GeForce RTX 4090", 24 << 30)
    assert rates is not None
    assert rates.source.startswith("profile mine,")


def test_a_pipeline_of_the_users_is_planned(write: Write) -> None:
    write("pipelines", "mine", like="stable-diffusion-1.5", repos=["me/mine"])
    assert load_pipeline_profile("me/mine").name == "mine"
    planned = run("plan", "mine", "--device", "rtx-4090", "--format", "json")
    assert planned.exit_code == 0, planned.output


def test_a_mistyped_name_is_held_against_the_users_too(write: Write) -> None:
    write("devices", "workstation", like="rtx-4090")
    with pytest.raises(UsageError, match="did you mean workstation"):
        load_device_profile("workstaton")


def test_a_broken_one_is_told_of_only_where_it_is_asked_for(write: Write) -> None:
    broken = write("devices", "broken", like="rtx-4090", memory_bytes="a lot")
    save(broken.parent.parent / "pipelines" / "broken.yaml", "- stable-diffusion-v1-5/stable-diffusion-v1-5\n")
    assert rates_for("NVIDIA GeForce RTX 4090") is not None
    assert load_pipeline_profile("stable-diffusion-v1-5/stable-diffusion-v1-5").name == "stable-diffusion-1.5"
    with pytest.raises(UsageError, match="did you mean"):
        load_pipeline_profile("stable-diffusion-v1-5/stable-diffusion-v1-4")
    with pytest.raises(VramplanError, match="memory_bytes: Input should be"):
        load_device_profile("broken")


def test_a_broken_file_that_stands_in_for_a_bundled_one_is_told_of(write: Write) -> None:
    write("devices", "rtx-4090", like="rtx-4090", memory_bytes=0)
    with pytest.raises(VramplanError, match="memory_bytes: Input should be greater than 0"):
        load_device_profile("rtx-4090")


def test_list_marks_the_users_and_what_is_wrong(write: Write) -> None:
    write("devices", "mine", like="rtx-4090")
    broken = write("devices", "broken", like="rtx-4090", color="red")
    lines = run("profiles", "list").stdout.splitlines()
    assert "  mine  yours" in lines
    assert "  rtx-4090" in lines
    told = [line for line in lines if line.startswith("  broken  yours, cannot be used: ")]
    assert len(told) == 1
    assert f"{broken}:" in told[0]
    assert "color: Unexpected keyword argument" in told[0]


@pytest.mark.parametrize(("kind", "like"), [("devices", "m2-16gb"), ("pipelines", "flux.1-dev")])
def test_check_says_what_it_takes_a_good_file_for(write: Write, kind: str, like: str) -> None:
    done = run("profiles", "check", write(kind, "mine", like=like))
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(f"mine.yaml: a {kind.removesuffix('s')} profile that can be used\n")


@pytest.mark.parametrize("name", ["rtx-4090", "gh200", "m4-max-128gb", "arc-b580", "mi300x"])
def test_check_finds_nothing_wrong_with_bundled_ones(name: str) -> None:
    assert check_profile(profile_path("devices", name)) == ("devices", ())


def test_check_names_every_mistake_with_its_line(write: Write) -> None:
    path = write("devices", "mine", like="rtx-4090", memory_bytes=-1, half_tflops="fast", color="red")
    lines = path.read_text(encoding="utf-8").splitlines()
    done = run("profiles", "check", path)
    assert done.exit_code == 2
    told = done.stdout.splitlines()
    for key, said in (("memory_bytes", "greater than 0"), ("half_tflops", "valid number"), ("color", "Unexpected")):
        number = 1 + next(number for number, line in enumerate(lines) if line.startswith(f"{key}:"))
        assert [line for line in told if line.startswith(f"{path}:{number}: {key}: ") and said in line]
    assert len(told) == 3
    assert done.stderr == f"vramplan: {path}: 3 mistakes, listed above: correct the file\n"


def test_a_mistake_deep_in_a_pipeline_has_its_line(write: Write) -> None:
    components = yaml.safe_load(profile_path("pipelines", "flux.1-dev").read_text(encoding="utf-8"))["components"]
    components["vae"]["parameters"] = "many"
    path = write("pipelines", "mine", like="flux.1-dev", components=components)
    _, (told,) = check_profile(path)
    number = int(told.removeprefix(f"{path}:").partition(":")[0])
    assert "components.vae.parameters" in told
    assert path.read_text(encoding="utf-8").splitlines()[number - 1].strip() == "parameters: many"


@pytest.mark.parametrize(
    ("part", "changes", "place", "said"),
    [
        (
            "vae",
            {"config": {"latent_chanels": 16}},
            "config.latent_chanels",
            "takes no latent_chanels, but latent_channels",
        ),
        ("text_encoder", {"config": {"hiden_size": 8}}, "config.hiden_size", "takes no hiden_size, but hidden_size"),
        ("scheduler", {"config": {"red": 1}}, "config.red", "FlowMatchEulerDiscreteScheduler takes no red"),
        ("vae", {"parameters": 7}, "parameters", "7, but AutoencoderKL has 83,819,683 as configured"),
        ("vae", {"parameters": None}, "", "AutoencoderKL has weights: give its number of parameters"),
        ("vae", {"class": "AutoencoderXL"}, "class", "diffusers.AutoencoderXL is not a class"),
        ("vae", {"config": {"block_out_channels": 5}}, "config", "no AutoencoderKL can be built from it"),
    ],
)
def test_what_the_libraries_say_otherwise_is_a_mistake(
    write: Write, part: str, changes: dict[str, Any], place: str, said: str
) -> None:
    document = yaml.safe_load(profile_path("pipelines", "flux.1-dev").read_text(encoding="utf-8"))
    kept = {name: item for name, item in document["components"].items() if name in ("vae", "text_encoder", "scheduler")}
    given = changes.get("config", {})
    kept[part] |= changes | ({"config": kept[part]["config"] | given} if given else {})
    path = write("pipelines", "mine", like="flux.1-dev", components=kept)
    _, (told,) = check_profile(path)
    where = ".".join(filter(None, ("components", part, place)))
    number = int(told.removeprefix(f"{path}:").partition(":")[0])
    assert told.startswith(f"{path}:{number}: {where}: ")
    assert said in told
    key = where.rpartition(".")[2]
    assert path.read_text(encoding="utf-8").splitlines()[number - 1].strip().startswith(f"{key}:")


def test_a_pipeline_class_that_is_not_here_is_a_mistake(write: Write) -> None:
    _, found = check_profile(write("pipelines", "mine", like="stable-diffusion-1.5", pipeline="NoPipeline"))
    assert [line for line in found if "pipeline: profile mine: diffusers" in line and "has no NoPipeline" in line]


def test_weights_without_a_count_are_not_left_out_silently(write: Write) -> None:
    """Without its denoiser a pipeline would fit anything."""
    components = yaml.safe_load(profile_path("pipelines", "stable-diffusion-1.5").read_text(encoding="utf-8"))[
        "components"
    ]
    del components["unet"]["parameters"]
    write("pipelines", "mine", like="stable-diffusion-1.5", components=components)
    planned = run("plan", "mine", "--device", "rtx-4090")
    assert planned.exit_code == 1
    assert "components.unet: UNet2DConditionModel has weights: give its number of parameters" in planned.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pool_bytes": 1 << 40}, "the whole document: give one of link"),
        ({"link": None}, "the whole document: give one of link"),
        ({"link": None, "pool_bytes": 1 << 30}, "the whole document: memory_bytes is more than pool_bytes"),
        ({"compute_capability": "8"}, "the whole document: compute_capability is not of the form"),
        ({"kind": "npu"}, "kind: Input should be 'cuda', 'rocm', 'xpu' or 'mps'"),
        ({"link": {"generation": 9, "lanes": 16}}, "link.generation: Input should be"),
        ({"link": {"generation": 4, "lanes": 0}}, "link.lanes: Input should be greater than 0"),
        ({"name": "other"}, "name: it must be the name of the file: write name: mine"),
    ],
)
def test_what_no_device_is_like_is_a_mistake(write: Write, changes: dict[str, Any], said: str) -> None:
    _, (told,) = check_profile(write("devices", "mine", like="rtx-4090", **changes))
    assert said in told
    assert "\n" not in told


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [1", "name: 2024-01-01\n", "\x00", "{? [a] : b}\n"])
def test_check_takes_any_file(tmp_path: Path, text: str) -> None:
    done = run("profiles", "check", save(tmp_path / "folder" / "odd.yaml", text))
    assert done.exit_code == 2
    assert "odd.yaml" in done.stdout
    assert "Traceback" not in done.output


def test_check_of_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    done = run("profiles", "check", tmp_path / "none.yaml")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "none.yaml" in done.stderr
