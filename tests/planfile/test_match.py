"""The settings of a plan, held against the components the plan itself records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

import vramplan
from vramplan.errors import UsageError
from vramplan.planfile.match import parse_settings
from vramplan.planfile.types import Plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    return vramplan.plan("stable-diffusion-1.5", device="rtx-4070", ram="32GiB", simulate=False)


def edited(plan: Plan, **placement: str | None) -> Plan:
    texts: Mapping[str, str | None] = {**plan.settings.placement, **placement}
    kept = {name: text for name, text in texts.items() if text is not None}
    return replace(plan, settings=replace(plan.settings, placement=kept))


def test_without_a_pipeline_every_component_of_the_plan_is_placed(plan: Plan) -> None:
    assert parse_settings(plan, None, plan.machine.accelerator)[0]
    with pytest.raises(UsageError, match=r"settings\.placement\.vae: vae is not placed"):
        parse_settings(edited(plan, vae=None), None, plan.machine.accelerator)


def test_without_a_pipeline_a_setting_for_none_of_its_components_is_refused(plan: Plan) -> None:
    with pytest.raises(UsageError, match=r"settings\.placement\.vea: StableDiffusionPipeline has no such component"):
        parse_settings(edited(plan, vae=None, vea="resident"), None, plan.machine.accelerator)
