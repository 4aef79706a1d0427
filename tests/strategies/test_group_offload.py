"""Groups as diffusers makes them, byte for byte, and the silent ways they can go wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from make_pipeline import build

from tests.support.specs import card, component, text_to_image
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.geometry import tensor_bytes
from vramplan.pipeline.modules import modules_of
from vramplan.strategies.group_offload import GroupOffload

SPEC = text_to_image()
CPU = torch.device("cpu")


def small(kind: str, name: str) -> torch.nn.Module:
    return modules_of(build(kind))[name]


def groups_of(module: torch.nn.Module) -> list[Any]:
    """Every ModuleGroup that diffusers' hooks hold, once."""
    found = {}
    for child in module.modules():
        registry = getattr(child, "_diffusers_hook", None)
        hook = registry.get_hook("group_offloading") if registry else None
        if hook is not None:
            found[id(hook.group)] = hook.group
    return list(found.values())


def tensors_in(group: Any) -> dict[int, torch.Tensor]:
    own = [*group.parameters, *group.buffers]
    return {id(t): t for t in (*own, *(t for m in group.modules for t in (*m.parameters(), *m.buffers())))}


def size(tensors: dict[int, torch.Tensor]) -> int:
    return sum(map(tensor_bytes, tensors.values()))


def is_rest(group: Any) -> bool:
    return all(module is not group.onload_leader for module in group.modules)


def apply(module: torch.nn.Module, setting: GroupOffload) -> list[Any]:
    """Through the strategy's own call, on a pipeline of one component."""

    class Pipe:
        components = {"part": module}

    setting.apply(Pipe(), ["part"], "cpu")
    return groups_of(module)


PARTS = [
    ("sd15-small", "unet"),
    ("sd15-small", "text_encoder"),
    ("sd15-small", "vae"),
    ("sdxl-small", "text_encoder_2"),
    ("flux-small", "transformer"),
    ("flux-small", "text_encoder_2"),
    ("cogvideox-small", "transformer"),
]


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_block_groups_are_those_of_diffusers(kind: str, name: str, blocks: int) -> None:
    module = small(kind, name)
    part = describe_component(name, module)
    groups = apply(module, GroupOffload(blocks=blocks).complete(part))
    real = sorted(size(tensors_in(group)) for group in groups if not is_rest(group))
    rest: dict[int, torch.Tensor] = {}
    for group in filter(is_rest, groups):
        rest |= tensors_in(group)
    lists = [list(sizes) for sizes in part.geometry.block_lists]
    ours = sorted(sum(sizes[i : i + blocks]) for sizes in lists for i in range(0, len(sizes), blocks))
    assert ours == real
    assert part.geometry.rest_bytes == size(rest)


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_leaf_groups_are_those_of_diffusers(kind: str, name: str) -> None:
    module = small(kind, name)
    part = describe_component(name, module)
    groups = [group for group in apply(module, GroupOffload(type="leaf")) if tensors_in(group)]
    assert len(groups) == part.geometry.leaf_count
    assert max(size(tensors_in(group)) for group in groups) <= part.geometry.largest_leaf_bytes


@pytest.mark.parametrize(("kind", "name"), PARTS)
@pytest.mark.parametrize("setting", [GroupOffload(), GroupOffload(blocks=2), GroupOffload(type="leaf")])
def test_what_a_forward_holds_is_at_least_what_is_there_at_once(kind: str, name: str, setting: GroupOffload) -> None:
    """Counted with diffusers' own onload and offload: the most bytes between them in a real call."""
    module = small(kind, name)
    part = describe_component(name, module)
    groups = apply(module, setting.complete(part))
    most = most_at_once(module, groups, kind)
    hold = setting.complete(part).hold(part, SPEC)
    assert 0 < most <= hold.running_bytes
    if setting == GroupOffload() and part.role != "vae":  # a VAE's encoder and decoder are charged together
        assert hold.running_bytes == most


def most_at_once(module: torch.nn.Module, groups: list[Any], kind: str) -> int:
    present: dict[int, torch.Tensor] = {}
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, size(present))

    for group in groups:
        group.onload_, group.offload_ = watched(group, present)
    for child in module.modules():
        registry = getattr(child, "_diffusers_hook", None)
        for reference in registry._fn_refs if registry else ():
            reference.forward = looking(reference.forward, look)
    with torch.no_grad():
        forward(module, kind)
    return most


def watched(group: Any, present: dict[int, torch.Tensor]) -> tuple[Any, Any]:
    def onload() -> None:
        present.update(tensors_in(group))

    def offload() -> None:
        for key in tensors_in(group):
            present.pop(key, None)

    return onload, offload


def looking(inner: Any, look: Any) -> Any:
    """diffusers runs what it wraps after its own onloading: look in between."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        look()
        return inner(*args, **kwargs)

    return forward


def forward(module: torch.nn.Module, kind: str) -> Any:
    name = type(module).__name__
    tokens = torch.ones((1, 8), dtype=torch.long)
    if "CLIP" in name or "T5" in name:
        return module(tokens)
    if name == "AutoencoderKL":
        return module.decode(torch.zeros((1, 4, 4, 4)))
    if name == "UNet2DConditionModel":
        return module(torch.zeros((1, 4, 8, 8)), 1, torch.zeros((1, 8, 64)))
    if name == "FluxTransformer2DModel":
        zeros = torch.zeros
        return module(
            zeros((1, 16, 16)), zeros((1, 8, 64)), zeros((1, 64)), zeros(1), zeros((16, 3)), zeros((8, 3)), zeros(1)
        )
    rotary = (torch.zeros((16, 16)), torch.zeros((16, 16)))
    return module(torch.zeros((1, 1, 4, 8, 8)), torch.zeros((1, 8, 64)), torch.zeros(1), image_rotary_emb=rotary)


@pytest.mark.parametrize(
    ("kind", "name", "within"),
    [("flux-small", "text_encoder_2", "encoder"), ("sd15-small", "text_encoder", "encoder")],
)
def test_a_text_encoders_blocks_are_found_only_within(kind: str, name: str, within: str) -> None:
    """diffusers' own default finds no group at all and moves the encoder as one piece."""
    bare = small(kind, name)
    apply_group_offloading(bare, CPU, offload_type="block_level", num_blocks_per_group=1)
    assert [group for group in groups_of(bare) if not is_rest(group)] == []
    part = describe_component(name, small(kind, name))
    setting = GroupOffload().complete(part)
    assert within in setting.within.split("/")
    assert len([group for group in apply(small(kind, name), setting) if not is_rest(group)]) == 3


def test_every_offered_block_setting_has_blocks_to_group() -> None:
    lump = component("image_encoder", role="image_encoder")
    assert {s.type for s in GroupOffload.variants(lump)} == {"leaf"}
    assert "no list of blocks" in str(GroupOffload().refusal(lump, SPEC, card()))


def test_other_ways_to_the_blocks_than_the_components_are_refused() -> None:
    part = describe_component("text_encoder_2", small("flux-small", "text_encoder_2"))
    assert GroupOffload(within="encoder").refusal(part, SPEC, card()) is None
    assert "leave it out" in str(GroupOffload(within="decoder").refusal(part, SPEC, card()))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (GroupOffload(blocks=0), "at least one block"),
        (GroupOffload(blocks=-3), "at least one block"),
        (GroupOffload(type="leaf", blocks=2), "leaves are not counted"),
        (GroupOffload(record_stream=True), "only work with stream=true"),
        (GroupOffload(low_cpu_mem_usage=True), "only work with stream=true"),
        (GroupOffload(stream=True, blocks=2), "one block per group"),
    ],
)
def test_options_that_diffusers_rejects_or_ignores_are_refused(setting: GroupOffload, words: str) -> None:
    assert words in str(setting.refusal(SPEC.component("transformer"), SPEC, card()))


@pytest.mark.parametrize("accelerator", [None, card(kind="mps")])
def test_streams_need_a_device_that_has_them(accelerator: Any) -> None:
    reason = GroupOffload(stream=True).refusal(SPEC.component("transformer"), SPEC, accelerator)
    assert "needs a device with streams" in str(reason)
    with pytest.raises(ValueError, match="streams"):
        apply_group_offloading(torch.nn.Linear(1, 1), CPU, offload_type="leaf_level", use_stream=True)


def test_a_stream_holds_the_next_group_too_and_a_recorded_one_a_third() -> None:
    part = SPEC.component("transformer")
    block = part.geometry.blocks[0]
    rest = part.geometry.rest_bytes
    sizes = [
        setting.hold(part, SPEC).running_bytes - rest
        for setting in (GroupOffload(), GroupOffload(stream=True), GroupOffload(stream=True, record_stream=True))
    ]
    assert sizes == [block, 2 * block, 3 * block]


def test_streams_pin_memory_and_transiently_double_it_by_block() -> None:
    part = SPEC.component("transformer")
    block, leaf = (GroupOffload(type=kind, stream=True).hold(part, SPEC) for kind in ("block", "leaf"))
    assert block.pinned_bytes == leaf.pinned_bytes == part.geometry.pinned_bytes > part.weight_bytes
    assert (block.host_transient_bytes, leaf.host_transient_bytes) == (part.weight_bytes, 0)
    low = GroupOffload(stream=True, low_cpu_mem_usage=True).hold(part, SPEC)
    assert (low.pinned_bytes, low.host_bytes) == (0, part.weight_bytes)


def test_without_a_stream_every_group_is_copied_back() -> None:
    part = SPEC.component("transformer")
    assert GroupOffload().hold(part, SPEC).moved_out_bytes == part.weight_bytes
    assert GroupOffload(stream=True).hold(part, SPEC).moved_out_bytes == 0


def test_removing_takes_every_hook_off() -> None:
    module = small("flux-small", "transformer")

    class Pipe:
        components = {"part": module}

    apply(module, GroupOffload())
    GroupOffload().remove(Pipe(), ["part"])
    assert groups_of(module) == []
