"""A plan is held against the machine and the pipeline of now: small changes are told, what cannot fit is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import vramplan
from vramplan.api.check import current_plan, drift_of, replanned
from vramplan.cli.main import main
from vramplan.common.versions import versions
from vramplan.errors import MismatchError, NothingFitsError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.planfile.file import dump_plan, parse_plan
from vramplan.planfile.types import Plan
from vramplan.units import GIB, MIB

CARD = Accelerator(
    kind="cuda", index=0, name="a card", total_bytes=8 * GIB, free_bytes=8 * GIB, driver="570.1", display=False
)
HOST = Host(total_bytes=32 * GIB, available_bytes=30 * GIB)
MODULES = ("vramplan.api.machine", "vramplan.api.check")


def machine(monkeypatch: pytest.MonkeyPatch, card: Accelerator | None, host: Host = HOST) -> Hardware:
    """What this machine has from now on."""
    here = Hardware(accelerators=(card,) if card else (), host=host)
    for module in MODULES:
        monkeypatch.setattr(f"{module}.detect", lambda: here)
    return here


def planned(model: Any, **options: Any) -> Plan:
    return vramplan.plan(model, simulate=False, height=64, width=64, **options)


@pytest.fixture
def folder(small_folder) -> str:
    return str(small_folder("sd15-small"))


def test_nothing_has_changed(monkeypatch, folder) -> None:
    machine(monkeypatch, CARD)
    plan = planned(folder)
    found = drift_of(plan)
    assert (found.broken, found.changes) == (None, ())
    assert found.sentence.startswith("the plan fits: it needs")
    assert plan.machine.software == versions()
    assert current_plan(plan, say=pytest.fail) is plan


def test_less_free_memory_is_told_with_both_numbers(monkeypatch, folder) -> None:
    machine(monkeypatch, CARD)
    plan = planned(folder)
    machine(monkeypatch, replace(CARD, free_bytes=4 * GIB))
    found = drift_of(plan)
    assert found.broken is None
    (change,) = found.changes
    assert change == "3.00 GiB of VRAM may be used, 6.72 GiB when it was planned"
    told: list[str] = []
    assert current_plan(plan, say=told.append) is plan
    assert told == [f"changed since it was planned: {change}"]


@pytest.mark.parametrize("name", ["torch", "diffusers", "transformers", "accelerate"])
def test_other_libraries_are_told_with_both_versions(monkeypatch, folder, name: str) -> None:
    machine(monkeypatch, CARD)
    plan = planned(folder)
    older = replace(plan, machine=replace(plan.machine, software=plan.machine.software | {name: "0.0.1"}))
    assert drift_of(older).changes == (f"{name} is {versions()[name]}, it was planned with 0.0.1",)


def test_another_driver_is_told(monkeypatch, folder) -> None:
    machine(monkeypatch, CARD)
    plan = planned(folder)
    machine(monkeypatch, replace(CARD, driver="580.2"))
    assert drift_of(plan).changes == ("the driver is 580.2, it was planned with 570.1",)


@pytest.mark.parametrize(
    ("card", "kind", "words"),
    [
        (None, "no device", "which this machine does not have"),
        (replace(CARD, name="another card"), "another device", "but cuda:0 is another card"),
        (replace(CARD, free_bytes=1030 * MIB), "short", "the plan no longer fits: it needs"),
        (replace(CARD, free_bytes=100 * MIB), "no memory", "the plan no longer fits: no VRAM is left to use"),
    ],
)
def test_what_cannot_be_any_more_is_refused(
    monkeypatch, folder, card: Accelerator | None, kind: str, words: str
) -> None:
    machine(monkeypatch, CARD)
    plan = planned(folder, settings={"placement": "resident"}, batch=8)
    machine(monkeypatch, card)
    found = drift_of(plan)
    assert found.broken is not None
    assert found.kind == kind
    assert words in found.broken
    with pytest.raises(MismatchError) as caught:
        current_plan(plan)
    assert "`replan=True`" in str(caught.value)


@pytest.mark.parametrize("name", ["a card", "a card of a great maker"])
def test_whether_the_sentence_itself_says_to_plan_again_is_no_matter_of_its_words(monkeypatch, folder, name) -> None:
    machine(monkeypatch, replace(CARD, name=name))
    plan = planned(folder)
    machine(monkeypatch, None)
    with pytest.raises(MismatchError, match="does not have; `replan=True` makes another"):
        current_plan(plan)
    machine(monkeypatch, CARD if name != CARD.name else replace(CARD, name="another card"))
    with pytest.raises(MismatchError, match=r"make a plan for it \(`replan=True` does so\)"):
        current_plan(plan)


def test_memory_given_by_hand_is_not_there_if_others_have_it(monkeypatch, folder) -> None:
    machine(monkeypatch, CARD)
    plan = planned(folder, vram="7GiB", settings={"placement": "resident"}, batch=8)
    assert drift_of(plan).broken is None
    machine(monkeypatch, replace(CARD, free_bytes=300 * MIB))
    assert "no longer fits" in str(drift_of(plan).broken)


def test_a_margin_that_was_asked_for_holds_here_too(monkeypatch, folder) -> None:
    machine(monkeypatch, CARD)
    plan = planned(folder, margin="7GiB")
    assert drift_of(plan).broken is None
    machine(monkeypatch, replace(CARD, free_bytes=7 * GIB))
    assert drift_of(plan).broken is not None


def test_planning_again_keeps_what_was_asked_for(monkeypatch, folder) -> None:
    machine(monkeypatch, CARD)
    fixed = {"decode": "vae_slicing", "placement.vae": "resident"}
    plan = planned(folder, settings=fixed, allow="near_lossless", prefer="memory", margin="1GiB", batch=2)
    machine(monkeypatch, replace(CARD, name="another card", free_bytes=6 * GIB))
    told: list[str] = []
    made = current_plan(plan, replan=True, say=told.append)
    assert made.machine.accelerator is not None
    assert made.machine.accelerator.name == "another card"
    assert (made.workload, made.asked) == (plan.workload, plan.asked)
    assert made.settings.decode == ("vae_slicing",)
    assert made.settings.placement["vae"] == "resident"
    assert made.model.fingerprint == plan.model.fingerprint
    assert "Planned again" in told[0]


def test_without_the_card_it_is_planned_for_what_is_there(monkeypatch, folder) -> None:
    machine(monkeypatch, CARD)
    plan = planned(folder)
    machine(monkeypatch, None)
    assert replanned(plan).machine.device == "cpu"


def test_where_nothing_fits_planning_again_says_so(monkeypatch, folder) -> None:
    machine(monkeypatch, CARD)
    plan = planned(folder, settings={"placement": "resident"}, margin="6GiB", batch=8)
    machine(monkeypatch, replace(CARD, free_bytes=6 * GIB + 520 * MIB))
    with pytest.raises(NothingFitsError):
        current_plan(plan, replan=True)


def test_another_pipeline_in_the_folder_is_told_before_it_is_loaded(monkeypatch, folder, small_folder) -> None:
    machine(monkeypatch, CARD)
    plan = planned(folder)
    with pytest.raises(
        MismatchError, match=r"is for a StableDiffusionPipeline, this is a .*; `replan=True` makes another"
    ):
        current_plan(plan, str(small_folder("sdxl-small")))
    parts = plan.model.components
    changed = replace(plan.model, fingerprint="x", components=(replace(parts[0], class_name="Another"), *parts[1:]))
    with pytest.raises(MismatchError, match=r"make the plan again \(`replan=True` does so\)"):
        current_plan(replace(plan, model=changed))
    made = current_plan(plan, str(small_folder("sdxl-small")), replan=True, say=lambda text: None)
    assert made.model.class_name == "StableDiffusionXLPipeline"


def test_a_plan_of_before_this_was_recorded_still_loads(monkeypatch, folder) -> None:
    machine(monkeypatch, CARD)
    plan = planned(folder)
    content = yaml.safe_load(dump_plan(plan))
    del content["asked"], content["machine"]["software"]
    older = parse_plan(yaml.safe_dump(content))
    assert drift_of(older).changes == ()
    assert replanned(older).settings == plan.settings


def test_what_was_asked_for_survives_the_file(monkeypatch, folder) -> None:
    machine(monkeypatch, CARD)
    plan = planned(folder, settings={"placement.vae": "resident", "decode": ["vae_slicing"]}, margin="1GiB")
    again = parse_plan(dump_plan(plan))
    assert again.asked == plan.asked
    assert again.asked.settings == {"placement.vae": ("resident",), "decode": ("vae_slicing",)}


class TestOnALivePipeline:
    def test_changes_are_warnings(self, monkeypatch, small_pipeline) -> None:
        machine(monkeypatch, None)
        pipe = small_pipeline("sd15-small")
        plan = planned(pipe)
        older = replace(plan, machine=replace(plan.machine, software={"diffusers": "0.1"}))
        with pytest.warns(UserWarning, match=r"diffusers is .*, it was planned with 0\.1"):
            vramplan.apply_plan(pipe, older)

    def test_what_no_longer_fits_leaves_it_as_it_was(self, monkeypatch, small_pipeline) -> None:
        machine(monkeypatch, None)
        pipe = small_pipeline("sd15-small")
        plan = planned(pipe, settings={"decode": "vae_slicing"}, batch=8)
        machine(monkeypatch, None, Host(total_bytes=2 * GIB, available_bytes=GIB + MIB))
        with pytest.raises(MismatchError, match="no longer fits"):
            vramplan.apply_plan(pipe, plan)
        assert "_vramplan_applied" not in vars(pipe)
        assert not pipe.vae.use_slicing


class TestCommand:
    def run(self, *args: Any) -> Any:
        return CliRunner().invoke(main, [str(arg) for arg in args])

    def test_apply_tells_what_changed_and_goes_on(self, monkeypatch, folder, tmp_path: Path) -> None:
        machine(monkeypatch, None)
        plan = planned(folder)
        path = tmp_path / "plan.yaml"
        path.write_text(dump_plan(replace(plan, machine=replace(plan.machine, software={"diffusers": "0.1"}))))
        done = self.run("apply", path)
        assert done.exit_code == 0, done.output
        assert "changed since it was planned: diffusers is" in done.stderr
        assert "changed since it was planned: diffusers is" in self.run("check", path).stdout

    def test_replan_applies_a_new_one(self, monkeypatch, folder, tmp_path: Path) -> None:
        machine(monkeypatch, CARD)
        path = tmp_path / "plan.yaml"
        path.write_text(dump_plan(planned(folder)))
        machine(monkeypatch, None)
        refused = self.run("apply", path)
        assert refused.exit_code == 4
        assert refused.stderr.count("\n") == 1
        done = self.run("apply", path, "--replan")
        assert done.exit_code == 0, done.output
        assert "Planned again: resident" in done.stderr
        assert "applied to the pipeline" in done.stdout
