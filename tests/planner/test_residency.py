"""Which components are on the device together: replayed, and as the real hooks have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from accelerate.hooks import CpuOffload
from make_pipeline import SMALL_KINDS

from tests.support.calls import call_kwargs
from tests.support.pipelines import EXTRA, make_extra
from tests.support.specs import GIB, component, pipeline, text_to_image
from vramplan.pipeline.live import spec_from_pipeline
from vramplan.pipeline.modules import modules_of
from vramplan.pipeline.types import PipelineSpec
from vramplan.planner.residency import ReplayedUse, replay
from vramplan.strategies import Placement
from vramplan.strategies.base import Hold
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.model_cpu_offload import ModelCpuOffload
from vramplan.strategies.resident import Resident
from vramplan.strategies.sequential_cpu_offload import SequentialCpuOffload

# Components together at one time in a real call with model offload, largest sets only; `controlnet` is on
# the device from its first use, outside of the chain. The same as in a simulation of 157 pipelines.
TOGETHER = {
    "sd15-small": [{"text_encoder"}, {"unet"}, {"vae"}],
    "sdxl-small": [{"text_encoder"}, {"text_encoder_2"}, {"unet"}, {"vae"}],
    "flux-small": [{"text_encoder"}, {"text_encoder_2"}, {"transformer"}, {"vae"}],
    "cogvideox-small": [{"text_encoder"}, {"transformer"}, {"vae"}],
    "img2img": [{"text_encoder", "vae"}, {"unet", "vae"}],
    "inpaint": [{"text_encoder", "vae"}, {"unet", "vae"}],
    "typo": [{"text_encoder"}, {"unet", "vae"}],
    "controlnet": [{"controlnet", "text_encoder"}, {"controlnet", "unet"}, {"controlnet", "vae"}],
    "video-to-video": [{"text_encoder", "vae"}, {"transformer", "vae"}],
    "sd3": [
        {"text_encoder", "text_encoder_3"},
        {"text_encoder_2", "text_encoder_3"},
        {"transformer"},
        {"vae"},
    ],
}


def holds(spec: PipelineSpec, setting: Placement) -> dict[str, Hold]:
    return {part.name: setting.hold(part, spec) for part in spec.components}


def replayed(spec: PipelineSpec) -> list[ReplayedUse]:
    return replay(spec, holds(spec, ModelCpuOffload())) + replay(
        spec, holds(spec, ModelCpuOffload()), skip_optional=True
    )


def watch(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, frozenset[str]]]:
    """With every use: which component runs, and which are on the device then. The device is the CPU."""
    names = {id(module): name for name, module in modules_of(pipe).items()}
    present: set[str] = set()
    seen: list[tuple[str, frozenset[str]]] = []
    plain = CpuOffload.pre_forward

    def pre_forward(hook: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        before = getattr(hook.prev_module_hook, "model", None)
        present.discard(names.get(id(before), ""))
        present.add(names[id(module)])
        seen.append((names[id(module)], frozenset(present)))
        return plain(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
    pipe.enable_model_cpu_offload(device="cpu")
    return seen


def largest(sets: Any) -> list[set[str]]:
    distinct = [set(found) for found in dict.fromkeys(sets)]
    return [found for found in distinct if not any(found < other for other in distinct)]


@pytest.fixture(params=[*SMALL_KINDS, *EXTRA])
def call(request, small_pipeline: Callable[..., Any]) -> tuple[str, Any, dict[str, Any]]:
    if request.param in EXTRA:
        return request.param, *make_extra(request.param)
    return request.param, small_pipeline(request.param), call_kwargs(request.param)


def test_the_replay_covers_what_the_real_hooks_do(call, monkeypatch) -> None:
    name, pipe, arguments = call
    spec = spec_from_pipeline(pipe)
    seen = watch(pipe, monkeypatch)
    pipe(**arguments)
    moments = replayed(spec)
    assert {used for used, _ in seen} == {use.component for use in spec.uses if not use.optional}
    for used, together in seen:
        covering = [m for m in moments if m.use.component == used and together <= set(m.on_device)]
        assert covering, f"{used} with {sorted(together)} was not foreseen"
        weights = sum(spec.component(part).weight_bytes for part in together)
        assert max(moment.weights_bytes for moment in covering) >= weights
    if name in TOGETHER:
        real = largest(together for _, together in seen)
        assert sorted(map(sorted, real)) == sorted(map(sorted, TOGETHER[name]))


@pytest.mark.parametrize("name", ["sd15-small", "cogvideox-small", "img2img", "inpaint", "sd3"])
def test_the_replay_is_exact_without_anything_unforeseen(name, small_pipeline, monkeypatch) -> None:
    pipe, arguments = make_extra(name) if name in EXTRA else (small_pipeline(name), call_kwargs(name))
    spec = spec_from_pipeline(pipe)
    seen = watch(pipe, monkeypatch)
    pipe(**arguments)
    ours = largest(frozenset(moment.on_device) for moment in replayed(spec))
    assert sorted(map(sorted, ours)) == sorted(map(sorted, largest(together for _, together in seen)))
    peak = max(sum(spec.component(part).weight_bytes for part in together) for _, together in seen)
    assert max(moment.weights_bytes for moment in replayed(spec)) == peak


def test_model_offload_holds_one_component_at_a_time_for_text_to_image() -> None:
    spec = text_to_image()
    assert [moment.on_device for moment in replayed(spec)][:4] == [
        ("text_encoder",),
        ("text_encoder",),
        ("transformer",),
        ("transformer",),
    ]


def test_a_skipped_encoder_keeps_its_predecessor_on_the_device() -> None:
    """HunyuanImagePipeline calls its second text encoder only for prompts with quoted text."""
    spec = text_to_image()
    skipping = pipeline(*spec.components, sequence=("text_encoder", "image_encoder", "transformer", "vae"))
    assert all("text_encoder" in moment.on_device for moment in replayed(skipping))


def test_what_is_outside_the_sequence_is_there_all_along() -> None:
    spec = text_to_image(sequence=("text_encoder", "vae"))
    assert all("transformer" in moment.on_device for moment in replayed(spec))
    assert min(moment.weights_bytes for moment in replayed(spec)) >= spec.component("transformer").weight_bytes


def test_an_excluded_component_is_there_all_along_and_not_in_ram() -> None:
    spec = text_to_image(excluded=frozenset({"vae"}))
    for setting in (ModelCpuOffload(), SequentialCpuOffload()):
        hold = setting.hold(spec.component("vae"), spec)
        assert hold.idle_bytes == hold.running_bytes == spec.component("vae").weight_bytes
        assert hold.host_bytes == 0
    assert all("vae" in moment.on_device for moment in replayed(spec))


def test_residents_are_all_there_in_every_moment() -> None:
    spec = text_to_image()
    for moment in replay(spec, holds(spec, Resident())):
        assert moment.weights_bytes == spec.weight_bytes
        assert set(moment.on_device) == {part.name for part in spec.components}
        assert moment.loaded_bytes == moment.sent_back_bytes == 0


def test_groups_are_there_only_while_their_component_runs() -> None:
    spec = text_to_image()
    told = holds(spec, GroupOffload(type="leaf"))
    for moment in replay(spec, told):
        assert moment.weights_bytes == told[moment.use.component].running_bytes


def test_the_loop_is_replayed_twice_and_the_second_round_stands_for_every_later_step() -> None:
    spec = text_to_image()
    loop = [moment for moment in replay(spec, holds(spec, ModelCpuOffload())) if moment.use.in_loop]
    assert [moment.repeat for moment in loop] == [0, 1]
    assert loop[0].loaded_bytes == spec.component("transformer").weight_bytes
    assert loop[0].sent_back_bytes == spec.component("text_encoder").weight_bytes
    assert (loop[1].loaded_bytes, loop[1].sent_back_bytes) == (0, 0)


def test_a_chain_that_runs_backwards_in_the_loop_is_reloaded_at_every_step() -> None:
    """SanaControlNet's sequence has the controlnet after the transformer, its call before."""
    parts = (component("transformer", 4 * GIB), component("controlnet", GIB, role="control"))
    spec = pipeline(*parts, component("vae", GIB, role="vae"), sequence=("transformer", "controlnet", "vae"))
    later = [moment for moment in replay(spec, holds(spec, ModelCpuOffload())) if moment.repeat]
    assert sum(moment.sent_back_bytes for moment in later) > 0
    assert max(moment.weights_bytes for moment in later) == 5 * GIB


def test_what_is_loaded_never_is_less_than_what_is_sent_back() -> None:
    for spec in (text_to_image(), text_to_image(conditions=True), text_to_image(sequence=("vae", "text_encoder"))):
        moments = replay(spec, holds(spec, ModelCpuOffload()))
        assert sum(m.loaded_bytes for m in moments) >= sum(m.sent_back_bytes for m in moments)
