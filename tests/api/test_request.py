"""A request is one value, whichever way it is given."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

import vramplan
from vramplan.api.request import PlanOptions, PlanRequest, make_request, request_of, stock_request
from vramplan.errors import UsageError
from vramplan.workload import SHORT_NAMES, WORKLOAD_NAMES

GIVEN = {
    "device": "rtx-4070",
    "vram": "10GiB",
    "allow": "near_lossless",
    "settings": {"placement.vae": "resident", "decode": ["vae_slicing", "vae_tiling"]},
    "dtype": "float16",
    "height": 512,
    "steps": 4,
}


def test_names_that_are_none_of_its_own_are_the_workloads() -> None:
    request = make_request(GIVEN)
    assert request.workload == {"height": 512, "steps": 4}
    assert request.settings == {"placement.vae": ("resident",), "decode": ("vae_slicing", "vae_tiling")}
    assert request.loading == {"dtype": "float16", "variant": None, "revision": None, "allow_pickle": False}


def test_the_typed_options_are_the_requests_fields_and_the_workloads_names() -> None:
    own = {item.name for item in fields(PlanRequest)} - {"workload"}
    names = own | set(WORKLOAD_NAMES) | set(SHORT_NAMES) | {"num_videos_per_prompt"}
    assert set(get_type_hints(PlanOptions)) <= names
    assert own <= set(get_type_hints(PlanOptions))
    assert str in get_args(get_type_hints(PlanOptions)["device"])


@pytest.mark.parametrize("given", [{"colour": "red"}, {"height": -1}])
def test_a_name_or_number_that_makes_no_sense_is_refused(given) -> None:
    with pytest.raises(UsageError):
        vramplan.plan("stable-diffusion-1.5", device="rtx-4070", simulate=False, **given)


def test_a_plan_gives_the_request_back_and_as_one_value_it_makes_the_same_plan() -> None:
    request = make_request({"device": "rtx-4070", "vram": "6GiB", "stock": True, "simulate": False, "steps": 4})
    plan = vramplan.plan("stable-diffusion-1.5", request)
    same = vramplan.plan("stable-diffusion-1.5", device="rtx-4070", vram="6GiB", stock=True, simulate=False, steps=4)
    assert plan.settings == same.settings
    assert plan.asked == same.asked == request.preferences
    again = request_of(plan)
    assert (again.vram, again.stock, again.workload["num_inference_steps"]) == ("6GiB", True, 4)


def test_restricted_to_stock_it_keeps_what_is_stock_and_opens_what_is_not() -> None:
    settings = {"placement.text_encoder": "encode_first", "placement.vae": "resident", "decode": ["vae_slicing"]}
    request = stock_request(make_request({"vram": "6GiB", "settings": settings}))
    assert (request.stock, request.vram) == (True, "6GiB")
    assert request.settings == {"placement.vae": ("resident",), "decode": ("vae_slicing",)}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"allow": "nonsense"}, "`allow`: 'nonsense' is none of lossless, near_lossless, lossy"),
        ({"prefer": "memry"}, "`prefer`: 'memry' is none of speed, memory"),
        ({"settings": "decode=vae_tiling"}, "`settings`: give them by axis and component"),
        ({"settings": {"decode": 5}}, "`settings`: give them by axis and component"),
    ],
)
def test_a_value_that_is_none_of_an_options_is_refused_in_one_line(given, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        make_request(given)


def test_a_request_and_options_are_refused_together() -> None:
    with pytest.raises(UsageError, match="`height`: a request holds all options"):
        vramplan.plan("stable-diffusion-1.5", PlanRequest(), height=64)
