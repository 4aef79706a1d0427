"""What was measured here decides the next budget: never less careful than the measurements say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.records import CARD, call, probe, took
from vramplan.api.machine import known_budget
from vramplan.calibration.learned import learned
from vramplan.calibration.published_errors import bundled_error
from vramplan.calibration.store import append
from vramplan.common.versions import versions
from vramplan.hardware.types import Hardware, Host
from vramplan.planner.residuals import needed
from vramplan.units import GIB, MIB

PIPELINE = "SomePipeline"
PUBLISHED = bundled_error("simulated")
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=64 * GIB, available_bytes=60 * GIB))


def keep(*records: object) -> None:
    for record in records:
        assert append(record) is None


def test_without_measurements_the_published_ones_hold() -> None:
    assert learned(CARD, "simulated").error == PUBLISHED
    assert learned(None, "simulated").error == PUBLISHED
    assert learned(CARD, "simulated").context_bytes is None


def test_enough_plans_of_the_same_pipeline_replace_them() -> None:
    keep(*(call(number, 0.001 * number) for number in range(needed())))
    error = learned(CARD, "simulated", PIPELINE).error
    assert error.share == pytest.approx(0.001 * (needed() - 1), rel=1e-6)
    told = "simulated peaks were at most 0.8% or 82 MiB too low in all 9"
    assert error.reason == f"{told} measurements of {PIPELINE} on this {CARD.name}"


def test_a_plan_in_other_words_and_one_from_before_plans_had_a_hash_are_no_further_plans() -> None:
    enough = needed()
    keep(*(call(number, plan=f"{number}") for number in range(enough - 1)))
    keep(call(0), call(0, plan="0", settings="in nicer words"))
    assert learned(CARD, "simulated", PIPELINE).error == PUBLISHED
    keep(call(enough, plan="one more"))
    assert learned(CARD, "simulated", PIPELINE).error != PUBLISHED


def test_better_measurements_tighten_the_margin_to_nothing() -> None:
    keep(*(call(number, -0.01) for number in range(needed())))
    budget = known_budget(MACHINE, replace(CARD, display=False), {}, pipeline=PIPELINE)
    assert {item.name: item.size_bytes for item in budget.deductions if item.memory == "vram"} == {
        "driver context": 512 * MIB,
        "margin": 0,
    }


def test_those_of_another_pipeline_never_tighten_it() -> None:
    keep(*(call(number, -0.01) for number in range(50)))
    assert learned(CARD, "simulated", "Another").error == PUBLISHED
    assert learned(CARD, "simulated").error == PUBLISHED


def test_one_that_was_far_too_low_counts_at_once() -> None:
    keep(call(1, 0.25))
    for pipeline in (PIPELINE, "Another"):
        assert learned(CARD, "simulated", pipeline).error.share == pytest.approx(0.25)
    budget = known_budget(MACHINE, CARD, {})
    assert budget.vram_bytes is not None
    assert budget.vram_bytes * 1.25 <= 24 * GIB - 512 * MIB


def test_one_of_many_others_raises_the_margin_only_as_often_as_the_bound_may_be_missed() -> None:
    keep(*(call(number, -0.01) for number in range(19)), call(19, 0.25))
    assert learned(CARD, "simulated", "Another").error == PUBLISHED
    keep(*(call(number, 0.25) for number in range(20, 23)))
    assert learned(CARD, "simulated", "Another").error.share == pytest.approx(0.25)


def test_a_few_of_its_own_count_for_it_whatever_the_others_say() -> None:
    keep(*(call(number, -0.01) for number in range(50)), call(50, 0.1, pipeline="Wild"))
    assert learned(CARD, "simulated", "Wild").error.share == pytest.approx(0.1)
    assert learned(CARD, "simulated", PIPELINE).error.share == 0


def test_the_same_plan_again_is_not_another_measurement() -> None:
    keep(*(call(1, -0.5) for _ in range(50)))
    assert learned(CARD, "simulated", PIPELINE).error == PUBLISHED


def test_of_one_plan_its_worst_call_counts() -> None:
    keep(*(call(number, 0.0) for number in range(needed())), call(3, 0.3))
    assert learned(CARD, "simulated", PIPELINE).error.share == pytest.approx(0.3)


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "Another Card"},
        {"basis": "assumed"},
        {"versions": versions() | {"torch": "1.0"}},
        {"versions": versions() | {"diffusers": "0.1"}},
        {"measured": took(None)},
        {"projected": took(0)},
    ],
)
def test_what_was_measured_of_something_else_plays_no_part(changes) -> None:
    keep(*(call(number, **{"share": 0.4} | changes) for number in range(20)))
    assert learned(CARD, "simulated", PIPELINE).error == PUBLISHED


def test_a_measured_context_is_taken_for_the_same_driver_and_torch() -> None:
    keep(probe(context_bytes=300 * MIB), probe(context_bytes=None))
    assert learned(CARD, "simulated").context_bytes == 300 * MIB
    assert learned(replace(CARD, driver="580.9"), "simulated").context_bytes is None
    budget = known_budget(MACHINE, CARD, {})
    context = next(item for item in budget.deductions if item.name == "driver context")
    assert context.size_bytes == 300 * MIB
    assert "measured on this machine" in context.reason
