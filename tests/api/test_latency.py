"""What keeps answers quick: nothing heavy is imported before arguments are checked, nor for what is known."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vramplan
from vramplan.errors import NothingFitsError
from vramplan.planfile.file import plan_to_dict
from vramplan.profiles import recorded
from vramplan.profiles.catalogue import pipeline_names
from vramplan.simulator.model import SimulatedModel

HEAVY = ("torch", "diffusers", "transformers", "accelerate")
RUN = """
import json, sys
from vramplan.cli.main import main
try:
    main(sys.argv[1:], prog_name="vramplan")
    code = 0
except SystemExit as found:
    code = found.code
print(json.dumps([code, [name for name in {heavy!r} if name in sys.modules]]), file=sys.stderr)
"""


def command(*arguments: str, also: tuple[str, ...] = ()) -> tuple[str, int, list[str]]:
    """What a command prints, its exit code, and which of the heavy modules it imported."""
    code = RUN.replace("{heavy!r}", repr((*HEAVY, *also)))
    ran = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    exit_code, imported = json.loads(ran.stderr.splitlines()[-1])
    return ran.stdout, exit_code, imported


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "flux.1-dev", "--device", "rtx-4070x"),
        ("plan", "flux.1-dv", "--device", "rtx-4070"),
        ("plan", "flux.1-dev", "--ram", "12Gx"),
        ("plan", "flux.1-dev", "--margin", "120%"),
        ("plan", "flux.1-dev", "-o", "/no/such/folder/plan.yaml"),
        ("simulate", "nope"),
        ("fit", "flux.1-dev", "nope"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_heavy_is_imported(arguments: tuple[str, ...]) -> None:
    _, code, imported = command(*arguments, also=("numpy", "pydantic", "rich"))
    assert (code, imported) == (2, [])


@pytest.mark.parametrize("given", ["placment=resident", "placement=residet", "decode=vae_tiling:til=3"])
def test_a_wrong_setting_is_told_before_the_model_is_described(given: str) -> None:
    assert command("plan", "flux.1-dev", "--device", "rtx-4070", "--set", given)[1:] == (2, [])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for a cache of its own; nothing that ships is used, nor was read before."""
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VRAMPLAN_RECORDED", "0")
    recorded.recorded.cache_clear()
    yield tmp_path
    recorded.recorded.cache_clear()


def test_a_plan_made_before_needs_no_torch_nor_does_one_for_another_budget(folder: Path) -> None:
    model, options = "stable-diffusion-1.5", ("--device", "rtx-4090", "--ram", "16GiB", "--json")
    first = plan_to_dict(vramplan.plan(model, device="rtx-4090", vram="2GiB", ram="16GiB"))
    again, code, imported = command("plan", model, "--vram", "2GiB", *options)
    assert (code, imported) == (0, [])
    assert json.loads(again)["settings"] == json.loads(json.dumps(first))["settings"]
    other, code, imported = command("plan", model, "--vram", "2.4GiB", *options)
    assert (code, imported) == (0, [])
    assert json.loads(other)["settings"] != json.loads(again)["settings"]


def simulated_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedModel, "replayed", lambda *_, **__: None)
    monkeypatch.setenv("VRAMPLAN_CACHE", "0")
    monkeypatch.setenv("VRAMPLAN_RECORDED", "0")


def facts(model: str, **options: Any) -> Any:
    """All of a plan; or why nothing fits."""
    try:
        found = plan_to_dict(vramplan.plan(model, device="rtx-4090", **options))
        return {key: value for key, value in found.items() if key != "machine"}  # whose free memory changes
    except NothingFitsError as error:
        return str(error)


def test_plans_from_replays_are_those_from_simulations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[dict[str, Any]] = [{"vram": f"{vram}GiB", "ram": "16GiB"} for vram in (1, 1.5, 2, 3, 4, 8)]
    found = [facts("stable-diffusion-1.5", **case) for case in cases]
    assert sum(isinstance(item, str) for item in found) <= 1
    assert len({json.dumps(item["settings"]) for item in found if not isinstance(item, str)}) > 2
    simulated_only(monkeypatch)
    assert [facts("stable-diffusion-1.5", **case) for case in cases] == found


@pytest.fixture
def packed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that writes the recorded file of a profile named `made`."""
    monkeypatch.delenv("VRAMPLAN_RECORDED")
    monkeypatch.setattr(recorded, "bundled_directory", lambda: folder)
    (folder / recorded.FOLDER).mkdir()

    def write(sources: tuple[str, ...] = ("torch/nn/functional.py",)) -> Path:
        path = folder / recorded.FOLDER / f"made{recorded.SUFFIX}"
        path.write_bytes(recorded.pack({"b": b"second", "a": b"first"}, sources))
        recorded.recorded.cache_clear()
        return path

    yield write
    recorded.recorded.cache_clear()


def test_recorded_values_are_read_while_code_and_sources_are_the_same(packed: Any, monkeypatch: Any) -> None:
    packed()
    assert recorded.recorded("made") == {"a": b"first", "b": b"second"}
    assert recorded.is_current("made")
    assert recorded.recorded("other") == {}
    path = packed()
    path.write_bytes(path.read_bytes()[:-9])
    assert recorded.recorded("made") == {}
    packed(())
    monkeypatch.setattr(recorded, "maker_digests", lambda: ["another"])
    assert recorded.recorded("made") == {}
    assert not recorded.is_current("made")


def test_recorded_values_are_not_of_libraries_with_other_sources(packed: Any, monkeypatch: Any, folder: Path) -> None:
    library = folder / "site" / "somelib"
    library.mkdir(parents=True)
    (library / "__init__.py").touch()
    (library / "code.py").write_text("1\n")
    monkeypatch.syspath_prepend(str(folder / "site"))
    packed(("somelib/code.py",))
    assert recorded.recorded("made")
    (library / "code.py").write_text("2\n")
    recorded.recorded.cache_clear()
    assert recorded.recorded("made") == {}
    (library / "code.py").unlink()
    recorded.recorded.cache_clear()
    assert recorded.recorded("made") == {}
    assert recorded.recorded("made") is not None
    assert "somelib" not in sys.modules


def test_what_ships_is_of_this_code() -> None:
    """Where this fails: `python benchmarks/record_profiles.py`, and commit what it writes."""
    shipped = [path.stem for path in (recorded.bundled_directory() / recorded.FOLDER).glob(f"*{recorded.SUFFIX}")]
    assert set(shipped) <= set(pipeline_names())
    assert [name for name in sorted(shipped) if not recorded.is_current(name)] == []


@pytest.mark.parametrize("model", ["flux.1-dev", "stable-diffusion-xl", "qwen-image"])
def test_a_bundled_profile_is_planned_without_torch(tmp_path: Path, monkeypatch: Any, model: str) -> None:
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path))
    recorded.recorded.cache_clear()
    if not recorded.recorded(model):
        pytest.skip("the libraries here have other sources than those that were recorded")
    assert command("plan", model, "--device", "rtx-4070", "--ram", "64GiB", "--json")[1:] == (0, [])
