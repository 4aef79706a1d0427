"""What happens to the machine between planning, applying and measuring: it is told, and nothing crashes."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

import vramplan
import vramplan.api.apply
from tests.api.test_check import CARD, folder, machine, planned  # noqa: F401 - folder is a fixture
from tests.support.calls import call_kwargs
from tests.support.machines import FakeNvml
from vramplan.api.check import current_plan, drift_of
from vramplan.cli.main import main
from vramplan.errors import MismatchError
from vramplan.hardware import nvidia_order, sampling
from vramplan.planfile.file import dump_plan
from vramplan.runtime.applied import applied_to
from vramplan.units import GIB, MIB

TAKEN = 2 * GIB


class TestAnotherProcessTakesTwoGibibytes:
    def test_where_the_plan_still_fits_it_is_a_warning_with_both_numbers(self, monkeypatch, small_pipeline) -> None:
        machine(monkeypatch, CARD)
        pipe = small_pipeline("sd15-small")
        plan = planned(pipe)
        machine(monkeypatch, replace(CARD, free_bytes=CARD.free_bytes - TAKEN))
        monkeypatch.setattr(vramplan.api.apply, "check_device", lambda *_: None)
        monkeypatch.setattr(vramplan.api.apply, "apply_unchecked", lambda pipe, plan, device, spec: "applied")
        with pytest.warns(UserWarning, match=r"4\.\d+ GiB of VRAM may be used, 6\.72 GiB when it was planned"):
            assert vramplan.apply_plan(pipe, plan) == "applied"

    def test_where_it_does_not_the_pipeline_stays_as_it_was(self, monkeypatch, small_pipeline) -> None:
        full = replace(CARD, free_bytes=TAKEN + 1400 * MIB)
        machine(monkeypatch, full)
        pipe = small_pipeline("sd15-small")
        plan = planned(pipe, settings={"placement": "resident"}, batch=8)
        machine(monkeypatch, replace(full, free_bytes=1400 * MIB))
        monkeypatch.setattr(vramplan.api.apply, "check_device", lambda *_: None)
        with pytest.raises(MismatchError, match=r"the plan no longer fits: it needs .* make it again"):
            vramplan.apply_plan(pipe, plan)
        assert applied_to(pipe) is None

    def test_the_command_ends_with_4_and_replans_on_request(self, monkeypatch, folder, tmp_path) -> None:  # noqa: F811
        full = replace(CARD, free_bytes=TAKEN + 1400 * MIB)
        machine(monkeypatch, full)
        plan = planned(folder, batch=8)
        fast = planned(folder, settings={"placement": "resident"}, batch=8)
        path = tmp_path / "plan.yaml"
        path.write_text(dump_plan(replace(plan, settings=fast.settings, projected=fast.projected)))
        machine(monkeypatch, replace(full, free_bytes=1400 * MIB))
        for command in ("apply", "check"):
            done = CliRunner().invoke(main, [command, str(path)])
            assert done.exit_code == 4, done.output
        loaded = vramplan.load_plan(path)
        told: list[str] = []
        made = current_plan(loaded, replan=True, say=told.append)
        assert made.projected.vram_reserved_bytes < loaded.projected.vram_reserved_bytes
        assert drift_of(made).broken is None
        assert "Planned again" in told[0]


class TestNvmlIsLost:
    @pytest.fixture
    def nvml(self, monkeypatch, tmp_path) -> FakeNvml:
        """A card as NVML tells of it; `told["error"]` is what it answers from then on."""
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(sampling, "SECONDS", 0.0)
        monkeypatch.setattr(nvidia_order, "ask_cuda", lambda: None)
        monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        link = {"MaxPcieLinkGeneration": 4, "CurrPcieLinkWidth": 16, "CudaComputeCapability": [8, 9]}
        memory = {"total": 24 * GIB, "free": 20 * GIB}
        card = {"Name": "NVIDIA GeForce RTX 4090", "UUID": "GPU-aaaa-1", "MemoryInfo": memory, **link}
        fake = FakeNvml({"cards": [card], "driver": "570.86.10"})
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    @pytest.mark.parametrize("code", ["GPU_IS_LOST", "UNKNOWN", "DRIVER_NOT_LOADED"])
    def test_after_planning_it_is_one_line_that_says_so(self, nvml, folder, tmp_path, code) -> None:  # noqa: F811
        plan = planned(folder)
        assert plan.machine.device == "cuda:0"
        path = tmp_path / "plan.yaml"
        path.write_text(dump_plan(plan))
        nvml.told["error"] = code
        done = CliRunner().invoke(main, ["apply", str(path)])
        assert done.exit_code == 4, done.output
        assert done.stderr.count("\n") == 1
        assert "which this machine does not have; nvidia: the driver does not answer" in done.stderr

    def test_a_card_whose_memory_is_not_told_any_more_is_refused_too(self, nvml, folder) -> None:  # noqa: F811
        plan = planned(folder)
        nvml.told["cards"][0]["MemoryInfo"] = {"error": "GPU_IS_LOST"}
        found = drift_of(plan)
        assert found.broken is not None
        assert "\n" not in found.broken

    def test_applying_and_calibrating_ask_nothing_of_it(self, nvml, small_pipeline, monkeypatch) -> None:
        pipe: Any = small_pipeline("sd15-small")
        plan = planned(pipe, settings={"placement": "resident"})
        nvml.told["error"] = "GPU_IS_LOST"
        vramplan.apply_plan(pipe, plan, device="cpu")
        with vramplan.calibrating(pipe) as took:
            pipe(**call_kwargs("sd15-small"))
        assert took.seconds > 0

    def test_while_it_is_calibrated_the_record_is_kept(self, nvml, small_pipeline) -> None:
        pipe: Any = small_pipeline("sd15-small")
        plan = planned(pipe, settings={"placement": "resident"})
        on_cpu = replace(plan, machine=replace(plan.machine, device="cpu"))
        vramplan.apply_plan(pipe, on_cpu, device="cpu")
        said: list[str] = []
        with vramplan.calibrating(pipe, say=said.append):
            nvml.told["error"] = "GPU_IS_LOST"
            pipe(**call_kwargs("sd15-small"))
        assert said == []
