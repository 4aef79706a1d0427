"""Values as text, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

import vramplan
from vramplan.calibration.peaks import Measured, Peak
from vramplan.hardware.types import Accelerator, Budget, Deduction, Hardware, Host
from vramplan.planfile.types import Settings, StockPlan, settings_text
from vramplan.planner.candidates import Refused
from vramplan.units import GIB, MIB, format_bytes
from vramplan.view.machine import hardware_dict
from vramplan.view.machine import text_of as hardware_text
from vramplan.view.plan import explain_view
from vramplan.view.plan import text_of as plan_text
from vramplan.view.run import measured_text
from vramplan.view.shared import to_json, to_yaml
from vramplan.view.terminal import as_text

CARD = Accelerator(kind="cuda", index=1, name="made-up card", total_bytes=8 * GIB, free_bytes=None)
HOST = Host(total_bytes=32 * GIB, available_bytes=30 * GIB, limit_bytes=16 * GIB, limit_source="cgroup")
MACHINE = Hardware(accelerators=(CARD,), host=HOST, notes=("a note",))
BUDGET = Budget(
    vram_bytes=7 * GIB,
    ram_bytes=20 * GIB,
    deductions=(
        Deduction(memory="vram", name="margin", size_bytes=GIB, reason="kept free"),
        Deduction(memory="ram", name="this pipeline", size_bytes=-2 * GIB, reason="is there already"),
    ),
)


@pytest.fixture(scope="module")
def plan(small_folder):
    folder = str(small_folder("flux-small"))
    made = vramplan.plan(folder, device=MACHINE, height=64, width=64, steps=2, simulate=False)
    return replace(made, model=replace(made.model, source="folder"))


def explained(plan):
    return as_text(explain_view(plan))


def lines(text):
    return text.splitlines()


class TestMachine:
    def test_json_holds_every_value_as_a_number(self):
        data = json.loads(to_json(hardware_dict(MACHINE, BUDGET)))
        assert data["schema_version"] == 1
        assert data["accelerators"][0]["total_bytes"] == 8 * GIB
        assert data["accelerators"][0]["free_bytes"] is None
        assert data["budget"]["deductions"][1]["size_bytes"] == -2 * GIB

    def test_yaml_holds_the_same_in_the_same_order(self):
        content = hardware_dict(MACHINE, BUDGET)
        as_yaml = yaml.safe_load(to_yaml(content))
        assert as_yaml == json.loads(to_json(content))
        assert list(as_yaml) == list(content)

    def test_for_people_unknown_is_unknown_and_not_zero(self):
        text = hardware_text(MACHINE, BUDGET)
        assert lines(text)[0].split(maxsplit=1) == ["cuda:1", "made-up card: 8.00 GiB, free unknown"]
        assert "RAM limit     16.00 GiB (cgroup)" in text

    def test_each_deduction_says_which_way_it_goes_and_why(self):
        text = hardware_text(MACHINE, BUDGET)
        assert "less 1.00 GiB margin: kept free" in text
        assert "plus 2.00 GiB this pipeline: is there already" in text
        vram, ram = text.index("  VRAM "), text.index("  RAM ")
        assert vram < text.index("margin") < ram < text.index("this pipeline")
        assert lines(text)[-1] == "note: a note"

    def test_without_an_accelerator_it_says_so_and_has_no_vram(self):
        text = hardware_text(replace(MACHINE, accelerators=()), replace(BUDGET, vram_bytes=None))
        assert "none found: plans are for the CPU" in text
        assert "VRAM" not in text

    def test_memory_shared_with_the_cpu_is_said_to_be(self):
        unified = replace(CARD, kind="mps", unified=True)
        assert "shared with the CPU" in hardware_text(replace(MACHINE, accelerators=(unified,)), BUDGET)


class TestPlan:
    def test_it_says_what_was_chosen_for_what_and_why(self, plan):
        rows = dict(line.split(maxsplit=1) for line in lines(plan_text(plan))[:8])
        assert rows["pipeline"] == "FluxPipeline (folder)"
        assert rows["on"] == "made-up card (cuda:1)"
        assert rows["for"] == "64 x 64, 2 steps"
        assert rows["chosen"] == "resident"
        assert rows["fits"].startswith("needs ")
        assert rows["speed"].endswith("(assumed)")
        assert rows["quality"] == "lossless"
        assert rows["why"] == plan.reason

    def test_the_stock_plan_is_one_row_with_what_it_costs(self, plan, small_folder):
        assert "\nstock " not in plan_text(plan)
        own = {"placement.text_encoder": "encode_first"}
        folder = str(small_folder("flux-small"))
        made = vramplan.plan(folder, device=MACHINE, height=64, width=64, steps=2, simulate=False, settings=own)
        slower = made.stock.projected.seconds_per_call / made.projected.seconds_per_call
        (row,) = [line for line in lines(plan_text(made)) if line.startswith("stock ")]
        assert row.startswith(f"stock     resident: {slower:.2f}x the time, ")
        assert f"stock: resident: {slower:.2f}x the time, " in explained(made)
        worse = replace(made, stock=replace(made.stock, quality="near_lossless"))
        assert next(line for line in lines(plan_text(worse)) if line.startswith("stock ")).endswith(", near lossless")
        none = replace(made, stock=StockPlan(reason="nothing fits; short"))
        assert "\nstock     none: nothing fits; short\n" in plan_text(none)

    def test_frames_and_batch_are_said_where_there_are_several(self, plan):
        more = replace(plan, workload=replace(plan.workload, num_frames=9, num_images_per_prompt=2))
        assert "64 x 64 x 9 frames, 2 per prompt, 2 steps" in plan_text(more)

    def test_sound_has_no_size(self) -> None:
        sound = vramplan.plan("stable-audio-open", device="rtx-4070", simulate=False, num_images_per_prompt=2)
        rows = dict(line.split(maxsplit=1) for line in lines(plan_text(sound))[:8])
        assert rows["for"] == "sound, 2 per prompt, 100 steps"
        assert "256" not in plan_text(sound)

    def test_every_phase_is_a_row(self, plan):
        text = plan_text(plan)
        table = text[text.index("phase ") :]
        for phase in plan.projected.phases:
            assert any(line.split()[:2] == [phase.name, phase.component] for line in lines(table))

    @pytest.mark.parametrize("columns", ["20", "80", "400"])
    def test_a_narrow_terminal_loses_no_number(self, plan, monkeypatch, columns):
        monkeypatch.setenv("COLUMNS", columns)
        text = plan_text(plan)
        assert "…" not in text
        assert "\x1b" not in text
        assert "activations" in text
        assert not any(line != line.rstrip() for line in lines(text))

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(1e-6, "0.001 ms"), (0.004, "4 ms"), (0.25, "0.25 s"), (3.14159, "3.1 s"), (75.2, "75 s"), (600, "10.0 min")],
    )
    def test_seconds_are_in_the_unit_people_would_use(self, plan, seconds, text):
        slow = replace(plan, projected=replace(plan.projected, seconds_per_step=seconds))
        assert f"about {text} a step" in plan_text(slow)

    def test_brackets_in_a_name_are_no_markup(self, plan):
        phase = replace(plan.projected.phases[0], on_device=("[bold]unet[/bold]", ":smile:"))
        odd = replace(plan, projected=replace(plan.projected, phases=(phase,)))
        assert "[bold]unet[/bold], :smile:" in plan_text(odd)


class TestSettings:
    def test_equal_placements_are_said_once(self):
        assert settings_text(Settings(placement={"unet": "resident", "vae": "resident"})) == "resident"

    def test_different_ones_name_their_components(self):
        settings = Settings(
            placement={"unet": "group_offload", "vae": "resident", "text_encoder": "resident"},
            decode=("vae_slicing", "vae_tiling:tile=32"),
        )
        expected = "unet: group_offload; vae, text_encoder: resident + vae_slicing + vae_tiling:tile=32"
        assert settings_text(settings) == expected


class TestExplain:
    def test_every_candidate_has_its_verdict_numbers_and_reason(self, plan):
        text = explained(plan)
        assert lines(text)[0] == f"{len(plan.candidates)} candidates for FluxPipeline; the first is the plan"
        verdicts = [line.split()[0] for line in lines(text) if line.startswith(("chosen", "fits", "rejected"))]
        assert verdicts == [item.verdict for item in plan.candidates]
        assert all(f"         {item.reason}" in lines(text) for item in plan.candidates)

    def test_what_was_refused_comes_last_with_the_reason(self, plan):
        refused = replace(plan, refused=(Refused(setting="x", component="vae", reason="it cannot be"),))
        assert lines(explained(refused))[-2:] == ["not possible here", "  x on vae: it cannot be"]
        assert "not possible here" not in explained(plan)


class TestMeasured:
    def rows(self, plan, **measured):
        table = lines(measured_text(plan, Measured(**measured)))
        return {line.strip().split("  ")[0]: line.split() for line in table[2:]}

    def test_projected_stands_beside_measured_with_the_difference(self, plan):
        demand = replace(plan.projected, vram_allocated_bytes=3 * GIB, vram_reserved_bytes=4 * GIB, ram_bytes=GIB)
        rows = self.rows(
            replace(plan, projected=demand),
            seconds=2.0,
            vram_allocated_bytes=2 * GIB,
            vram_reserved_bytes=5 * GIB,
            ram_bytes=GIB,
        )
        assert rows["VRAM allocated"][2:] == ["3.00", "GiB", "2.00", "GiB", "+50.0%"]
        assert rows["VRAM reserved"][-1] == "-20.0%"
        assert rows["RAM"][-1] == "+0.0%"
        assert rows["a call"][-2:] == ["2", "s"]

    def test_a_phase_that_was_told_apart_has_its_row(self, plan):
        rows = self.rows(plan, phases={"denoise": Peak(allocated_bytes=GIB, reserved_bytes=2 * GIB)})
        highest = max(phase.allocated_bytes for phase in plan.projected.phases if phase.name == "denoise")
        assert rows["denoise"][3:5] == ["1.00", "GiB"]
        assert rows["denoise"][1:3] == format_bytes(highest).split()
        assert not {"encode", "decode"} & rows.keys()

    def test_what_was_not_measured_is_no_row(self, plan):
        assert set(self.rows(plan, seconds=1.0, ram_bytes=MIB)) == {"RAM", "a call"}

    def test_nothing_measured_divides_by_nothing(self, plan):
        assert "%" not in measured_text(plan, Measured(seconds=0.0, ram_bytes=0))
