"""From a model and a machine to a plan, with rules of thumb in place of a simulation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.support.specs import GIB, card, component, pipeline
from vramplan.api.plan import describe, plan
from vramplan.errors import NothingFitsError, UsageError, VramplanError
from vramplan.hardware.types import Hardware, Host
from vramplan.planfile.types import all_stock

HOST = Host(total_bytes=64 * GIB, available_bytes=60 * GIB)


def machine(vram: int | None = 24 * GIB, **changes: Any) -> Hardware:
    cards = () if vram is None else (card(vram, **changes),)
    return Hardware(accelerators=cards, host=HOST)


def quick(model: Any, device: Any = None, **options: Any) -> Any:
    return plan(model, device=machine() if device is None else device, simulate=False, **options)


def test_a_plan_says_what_it_is_for_and_why() -> None:
    made = quick("stable-diffusion-1.5")
    assert made.model.class_name == "StableDiffusionPipeline"
    assert made.machine.device == "cuda:0"
    assert set(made.settings.placement) == {part.name for part in made.model.components}
    assert set(made.settings.placement.values()) == {"resident"}
    assert made.quality == "lossless"
    assert made.reason
    assert made.candidates[0].verdict == "chosen"
    assert made.projected.basis == "assumed"


def test_a_hub_id_that_a_profile_lists_is_that_profile() -> None:
    by_id = quick("black-forest-labs/FLUX.1-dev")
    assert by_id.model == quick("flux.1-dev").model


@pytest.mark.parametrize(("name", "words"), [("flux.1-dov", "flux.1-dev"), ("nobody/nothing", "no such folder")])
def test_a_name_nothing_goes_by_suggests_one(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        quick(name)


def test_a_folder_is_known_by_its_form(tmp_path) -> None:
    for path in (tmp_path / "nothing", "./nothing", "~/nothing/at/all"):
        with pytest.raises(VramplanError, match="no such folder"):
            quick(path)


def test_a_live_pipeline_keeps_its_dtype(small_pipeline) -> None:
    pipe = small_pipeline("sd15-small")
    with pytest.raises(UsageError, match="a live one keeps its own"):
        quick(pipe, dtype="float16")
    assert {part.dtype for part in quick(pipe).model.components} == {"float32"}
    assert quick(pipe).model.source == "live"


@pytest.mark.parametrize("thing", [object(), 5, [1]])
def test_what_is_no_pipeline_is_refused(thing: Any) -> None:
    with pytest.raises(VramplanError, match="is not a diffusers pipeline"):
        quick(thing)


def test_a_hooked_pipeline_is_left_alone(small_pipeline) -> None:
    pipe = small_pipeline("sd15-small")
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(VramplanError, match="set outside vramplan"):
        quick(pipe)


def test_the_folder_and_the_pipeline_it_loads_to_get_the_same_settings(small_folder, small_pipeline) -> None:
    for kind in ("sd15-small", "cogvideox-small"):
        made, live = quick(small_folder(kind)), quick(small_pipeline(kind))
        assert made.settings == live.settings
        assert made.model.fingerprint == live.model.fingerprint
        assert made.workload == live.workload


def test_the_defaults_are_those_of_the_call_and_of_the_profile() -> None:
    assert quick("cogvideox-5b", machine(80 * GIB)).workload.num_frames == 49
    assert quick("stable-diffusion-xl", height=512, steps=3).workload.height == 512
    assert quick("stable-diffusion-xl", height=512, steps=3).workload.num_inference_steps == 3
    with pytest.raises(UsageError, match="is not part of a workload"):
        quick("stable-diffusion-xl", heigth=512)


def test_nothing_fits_is_an_error_with_numbers() -> None:
    with pytest.raises(NothingFitsError, match=r"needs .* may be used: short by"):
        quick("flux.1-dev", vram="256MiB")


def test_the_cpu_plan_says_that_it_is_slow() -> None:
    made = quick("stable-diffusion-1.5", machine(None))
    assert made.machine.device == "cpu"
    assert made.machine.accelerator is None
    assert made.projected.vram_reserved_bytes == 0
    assert any("which is slow" in note for note in made.notes)


def test_components_outside_the_sequence_are_told() -> None:
    told = [note for note in quick("stable-diffusion-1.5").notes if "not in the offload sequence" in note]
    assert len(told) == 1
    assert "StableDiffusionPipeline: safety_checker; " in told[0]
    assert not [note for note in quick("flux.1-dev").notes if "not in the offload sequence" in note]


def test_settings_by_hand_are_in_the_plan() -> None:
    made = quick("stable-diffusion-xl", settings={"placement": "model_cpu_offload", "decode": "vae_tiling:tile=512"})
    assert set(made.settings.placement.values()) == {"model_cpu_offload"}
    assert made.settings.decode == ("vae_tiling:tile=512",)
    assert made.quality == "near_lossless"


class TestStock:
    def test_it_is_the_plan_of_the_same_request_with_stock(self) -> None:
        memory: dict[str, Any] = {"vram": "2GiB", "ram": "8GiB"}
        made, stock = quick("stable-diffusion-1.5", **memory), quick("stable-diffusion-1.5", stock=True, **memory)
        assert not all_stock(made.settings)
        assert all_stock(stock.settings)
        assert (made.stock.settings, made.stock.projected) == (stock.settings, stock.projected)
        assert made.stock.projected.seconds_per_call > made.projected.seconds_per_call
        assert (stock.stock, stock.asked.stock, made.asked.stock) == (None, True, False)

    def test_it_is_simulated_within_the_budget_as_the_plan_is(self, small_folder) -> None:
        given: dict[str, Any] = {"settings": {"placement.text_encoder": "encode_first"}, "height": 64, "width": 64}
        made = plan(str(small_folder("sd15-small")), device=machine(), **given)
        alone = plan(str(small_folder("sd15-small")), device=machine(), **given | {"settings": {}, "stock": True})
        assert made.stock.projected == alone.projected
        assert alone.projected.basis == "simulated"

    def test_a_plan_that_is_stock_records_none(self) -> None:
        assert quick("stable-diffusion-1.5").stock is None

    def test_where_none_fits_it_says_why(self) -> None:
        found = quick("stable-diffusion-xl", vram="3GiB", ram="1GiB").stock
        assert "short by" in found.reason
        assert (found.settings, found.quality, found.projected) == (None, None, None)

    def test_settings_by_hand_are_kept_if_they_are_stock(self) -> None:
        fixed = {"placement.text_encoder": "encode_first", "placement.vae": "group_offload:type=leaf"}
        found = quick("stable-diffusion-1.5", settings=fixed).stock
        assert found.settings.placement["vae"] == "group_offload:type=leaf"
        assert found.settings.placement["text_encoder"] == "resident"


def test_the_weights_of_a_live_pipeline_are_given_back_to_ram(small_pipeline) -> None:
    made = quick(small_pipeline("sd15-small"))
    given = [item for item in made.machine.budget.deductions if item.name == "this pipeline"]
    assert [(item.memory, item.size_bytes) for item in given] == [
        ("ram", -sum(part.weight_bytes for part in made.model.components))
    ]
    fixed = quick(small_pipeline("sd15-small"), ram="8GiB")
    assert fixed.machine.budget.ram_bytes == 8 * GIB


def test_each_reason_to_refuse_is_told_once() -> None:
    made = quick("flux.1-dev", machine(24 * GIB, kind="mps"))
    reasons = [item.reason for item in made.refused]
    assert reasons
    assert len(reasons) == len(set(reasons))


def test_the_same_question_gives_the_same_plan() -> None:
    assert quick("cogvideox-2b") == quick("cogvideox-2b")


def test_unified_memory_is_planned_resident_or_not_at_all() -> None:
    shared = machine(24 * GIB, kind="mps", unified=True, name="Apple M4")
    made = quick("stable-diffusion-xl", shared)
    assert set(made.settings.placement.values()) == {"resident"}
    assert any("shares one memory" in item.reason for item in made.refused)


def test_a_folder_is_described_without_loading_it(small_folder, monkeypatch) -> None:
    from safetensors import torch as files

    monkeypatch.setattr(files, "load_file", lambda *_: pytest.fail("weights were read"))
    described = describe(small_folder("flux-small"), dtype="bf16")
    assert {part.dtype for part in described.spec.components} == {"bfloat16"}


def test_a_spec_finds_its_components_by_name() -> None:
    part = component("vae", GIB, role="vae")
    spec = pipeline(component("transformer", GIB), part)
    assert spec.component("vae") is part
    assert spec.vaes == (part,)
    assert spec.weight_bytes == 2 * GIB
    with pytest.raises(KeyError):
        spec.component("unet")
    assert replace(spec, components=()).weight_bytes == 0


def margin_of(made: Any) -> Any:
    return next(item for item in made.machine.budget.deductions if (item.memory, item.name) == ("vram", "margin"))


def test_a_kind_of_call_that_is_less_well_known_says_so_in_its_budget() -> None:
    one, two = quick("stable-diffusion-1.5"), quick("stable-diffusion-1.5", batch=2)
    assert (one.machine.budget.kinds, two.machine.budget.kinds) == ((), ("several",))
    assert margin_of(two).size_bytes >= margin_of(one).size_bytes


def test_a_plan_with_changed_weights_is_within_a_budget_of_its_own() -> None:
    options = {"dtype": "bfloat16", "allow": "lossy"}
    given = quick("flux.1-dev", settings={"weights.transformer": "layerwise_casting"}, **options)
    assert given.machine.budget.kinds == ("quantized",)
    assert quick("flux.1-dev", machine(64 * GIB), **options).machine.budget.kinds == ()
