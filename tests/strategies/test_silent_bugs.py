"""What diffusers 0.42 lets pass and then does wrong without a word: never planned, and refused by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading

from tests.support.specs import GIB, WORK, budget, card, component, pipeline, text_to_image
from vramplan.errors import UsageError, VramplanError
from vramplan.pipeline.component import describe_component
from vramplan.pipeline.live import spec_from_pipeline
from vramplan.pipeline.live_memory import refuse_hooked
from vramplan.pipeline.types import Component, PipelineSpec, Tiling
from vramplan.planner.candidates import CandidateRow, rows
from vramplan.planner.decide import decide
from vramplan.planner.fixed import Fixed, parse_fixed
from vramplan.planner.footprint import AssumedFootprint
from vramplan.strategies.base import offload_refusal
from vramplan.strategies.encode_first import EncodeFirst
from vramplan.strategies.group_offload import GroupOffload
from vramplan.strategies.layerwise_casting import LayerwiseCasting
from vramplan.strategies.model_cpu_offload import ModelCpuOffload, forget_device
from vramplan.strategies.resident import Resident
from vramplan.strategies.sequential_cpu_offload import SequentialCpuOffload
from vramplan.strategies.settings import grouped
from vramplan.strategies.vae_tiling import VaeTiling
from vramplan.strategies.weight_streaming import WeightStreaming

VAES = (
    "AutoencoderKLCogVideoX",
    "AutoencoderKLMochi",
    "AutoencoderKLQwenImage",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLTemporalDecoder",
)


def tried(spec: PipelineSpec, **fixed: Any) -> list[CandidateRow]:
    return rows(spec, WORK, Fixed(**fixed), card())[0]


def settings_of(spec: PipelineSpec, name: str) -> set[Any]:
    """Every placement a component has in any candidate."""
    return {placement[name] for row in tried(spec) for placement in row.placements}


def with_part(part: Component) -> PipelineSpec:
    return pipeline(component("transformer", 8 * GIB, blocks=8), part)


def decided(spec: PipelineSpec, settings: dict[str, Any], **options: Any) -> Any:
    told = {"accelerator": card(), "footprint": AssumedFootprint(spec=spec, workload=WORK)} | options
    return decide(spec, WORK, budget(), fixed=parse_fixed(settings, spec), **told)


@pytest.mark.parametrize("name", VAES)
def test_block_groups_on_a_vae_that_does_not_name_its_blocks(name: str) -> None:
    """encode() and decode() run no hook on the VAE itself, so its weights would never be loaded."""
    with torch.device("meta"):
        vae = describe_component("vae", getattr(diffusers, name)())
    spec = with_part(vae)
    assert not [s for s in settings_of(spec, "vae") if isinstance(s, GroupOffload) and s.type == "block"]
    with pytest.raises(UsageError, match="would never be loaded"):
        decided(spec, {"placement.vae": "group_offload:type=block"})


def test_the_hooks_of_such_a_vae_really_do_not_run() -> None:
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4,) * 4, norm_num_groups=2, layers_per_block=1, latent_channels=2
    ).eval()
    apply_group_offloading(vae, torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    loaded = []
    group = vae._diffusers_hook.get_hook("group_offloading").group
    group.onload_ = lambda: loaded.append("rest")
    with torch.no_grad():
        vae.decode(torch.zeros((1, 2, 1, 2, 2)))
    assert loaded == []


def test_block_groups_on_a_vae_that_names_its_blocks() -> None:
    with torch.device("meta"):
        vae = describe_component("vae", diffusers.AutoencoderKL(block_out_channels=(32, 32)))
    assert vae.block_offload_refusal is None


def test_streams_on_a_vae() -> None:
    """decode() never wires the prefetching, and the execution order grows with every call."""
    spec = text_to_image()
    assert not [s for s in settings_of(spec, "vae") if isinstance(s, GroupOffload) and s.stream]
    with pytest.raises(UsageError, match="streams do nothing for a VAE"):
        decided(spec, {"placement.vae": "group_offload:type=leaf,stream=true"})


def test_an_offload_device_of_an_earlier_call() -> None:
    """`gpu_id or index or self._offload_gpu_id`: index 0 counts as not given."""
    pipe = SimpleNamespace(_offload_gpu_id=1)
    forget_device(pipe)
    assert not hasattr(pipe, "_offload_gpu_id")
    forget_device(pipe)


@pytest.mark.parametrize("setting", [ModelCpuOffload(), SequentialCpuOffload()])
def test_both_whole_pipeline_offloads_forget_an_earlier_device(setting: Any) -> None:
    seen = []

    class Pipe(SimpleNamespace):
        def enable(self, device: str) -> None:
            seen.append((device, hasattr(self, "_offload_gpu_id")))

    pipe = Pipe(_offload_gpu_id=1, components={})
    pipe.enable_model_cpu_offload = pipe.enable_sequential_cpu_offload = pipe.enable
    setting.apply(pipe, [], "cuda:0")
    assert seen == [("cuda:0", False)]


def test_the_device_really_is_lost_in_diffusers(small_pipeline) -> None:
    pipe = small_pipeline("sd15-small")
    pipe._offload_gpu_id = 1
    pipe.enable_model_cpu_offload(device="cuda:0")  # nothing is moved before the first call
    assert str(pipe._all_hooks[0].hook.execution_device) == "cuda:1"
    pipe.remove_all_hooks()
    forget_device(pipe)
    pipe.enable_model_cpu_offload(device="cuda:0")
    assert str(pipe._all_hooks[0].hook.execution_device) == "cuda:0"


def test_offload_to_disk_is_no_option() -> None:
    """Stale files, files of another component, and garbage in tied weights."""
    spec = text_to_image()
    with pytest.raises(UsageError, match="no option 'offload_to_disk_path'"):
        parse_fixed({"placement.transformer": "group_offload:offload_to_disk_path=here"}, spec)
    assert "offload_to_disk_path" not in GroupOffload.__slots__


def test_block_groups_without_blocks() -> None:
    """diffusers finds no group in a text encoder and moves it as a whole, without saying so."""
    spec = with_part(component("text_encoder", role="text_encoder"))
    assert not [s for s in settings_of(spec, "text_encoder") if isinstance(s, GroupOffload) and s.type == "block"]
    with pytest.raises(UsageError, match="has no list of blocks to group"):
        decided(spec, {"placement.text_encoder": "group_offload"})


def test_a_class_that_forbids_group_offload() -> None:
    """apply_group_offloading does not ask `_supports_group_offloading`; only the model's own method does."""
    with torch.device("meta"):
        movq = describe_component("movq", diffusers.VQModel())
    spec = with_part(movq)
    assert not [s for s in settings_of(spec, "movq") if isinstance(s, GroupOffload)]
    with pytest.raises(UsageError, match="_supports_group_offloading is False"):
        decided(spec, {"placement.movq": "group_offload:type=leaf"})


def test_statistics_that_are_read_while_they_are_in_a_file() -> None:
    """They are moved to the device by hand, so torch does not see that nothing was loaded."""
    prior = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=4, num_layers=2, embedding_dim=8)
    described = describe_component("prior", prior)
    spec = with_part(described)
    with pytest.raises(UsageError, match=r"reads clip_mean in post_process_latents\(\), while it is in its file"):
        decided(spec, {"placement.prior": "group_offload:disk=true"})
    assert GroupOffload().refusal(described, spec, card()) is None


def with_attention() -> PipelineSpec:
    """An image encoder with nn.MultiheadAttention, as SigLIP's head has."""

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2)

    return with_part(describe_component("image_encoder", Head()))


def test_leaves_of_a_multihead_attention() -> None:
    """It reads its projection's weights without calling the projection, so no hook loads them."""
    spec = with_attention()
    whole = {Resident(), ModelCpuOffload(), WeightStreaming(locked=1)}
    assert settings_of(spec, "image_encoder") == whole
    with pytest.raises(UsageError, match="MultiheadAttention"):
        decided(spec, {"placement.image_encoder": "group_offload:type=leaf"})
    with pytest.raises(UsageError, match="MultiheadAttention"):
        decided(spec, {"placement": "sequential_cpu_offload"})


def test_a_map_over_several_devices() -> None:
    """enable_sequential_cpu_offload() strips every hook before it raises."""
    spec = text_to_image(device_map={"transformer": "0", "vae": "1"})
    assert tried(spec) == []
    for setting in (ModelCpuOffload(), SequentialCpuOffload(), GroupOffload(type="leaf"), Resident()):
        for part in spec.components:
            assert "reset_device_map()" in str(setting.refusal(part, spec, card()))
    with pytest.raises(UsageError, match=r"reset_device_map\(\)"):
        decided(spec, {})


def test_a_class_without_a_sequence() -> None:
    spec = text_to_image(sequence=None)
    assert ModelCpuOffload() not in settings_of(spec, "transformer")
    with pytest.raises(UsageError, match="has no model_cpu_offload_seq"):
        decided(spec, {"placement": "model_cpu_offload"})


def test_a_class_whose_call_never_frees_its_hooks() -> None:
    """The second call would find the first one's components still on the device."""
    spec = text_to_image(frees_hooks=False)
    assert ModelCpuOffload() not in settings_of(spec, "transformer")
    with pytest.raises(UsageError, match="never calls maybe_free_model_hooks"):
        decided(spec, {"placement": "model_cpu_offload"})


def test_tiling_that_does_nothing() -> None:
    """SDXL's own tile is 1024: on a picture of 1024 the switch changes nothing."""
    vae = component("vae", role="vae", tiling=Tiling(height=1024, width=1024, sides=(1024, 512, 256)))
    spec = with_part(vae)
    tiles = {setting.tile for row in tried(spec) for setting in row.decode if isinstance(setting, VaeTiling)}
    assert 512 in tiles
    assert max(tiles) < 1024
    for text in ("vae_tiling", "vae_tiling:tile=1024"):
        with pytest.raises(UsageError, match="tiling would do nothing; give a smaller tile"):
            decided(spec, {"decode": text})


def test_tiles_that_change_the_pictures_size() -> None:
    """A CogVideoX VAE with tiles of 32 px decodes 64 x 64 to 70 x 68."""
    with torch.device("meta"):
        spec = with_part(describe_component("vae", diffusers.AutoencoderKLCogVideoX()))
    assert not [s for row in tried(spec) for s in row.decode if getattr(s, "tile", 0) not in (0, 240, 192, 144, 96, 48)]
    with pytest.raises(UsageError, match="would change the picture's size: use 96, 144, 48"):
        decided(spec, {"decode": "vae_tiling:tile=97"})


@pytest.mark.parametrize("decode", ["plain", "vae_slicing"])
def test_a_vae_that_only_decodes_in_tiles_is_tiled(decode: str) -> None:
    """AutoencoderKLAllegro raises NotImplementedError without."""
    with torch.device("meta"):
        vae = describe_component("vae", diffusers.AutoencoderKLAllegro())
    spec = pipeline(component("transformer", blocks=4), vae, video=True)
    found = tried(spec)
    assert found
    assert all(any(isinstance(s, VaeTiling) for s in row.decode) for row in found)
    assert decided(spec, {"decode": ["vae_tiling", "vae_slicing"]}).chosen.decode
    with pytest.raises(UsageError, match="decodes in tiles or not at all"):
        decided(spec, {"decode": decode})


def test_a_picture_such_a_vae_cannot_tile_is_refused() -> None:
    with torch.device("meta"):
        vae = describe_component("vae", diffusers.AutoencoderKLAllegro())
    spec = pipeline(component("transformer", blocks=4), vae, video=True)
    small = type(WORK)(height=256, width=256, num_frames=8)
    assert rows(spec, small, Fixed(), card())[0] == []


class TestAlreadyHooked:
    def test_model_offload(self, small_pipeline) -> None:
        pipe = small_pipeline("sd15-small")
        pipe.enable_model_cpu_offload(device="cpu")
        with pytest.raises(VramplanError, match=r"already has model cpu offload, .*remove_all_hooks\(\)"):
            refuse_hooked(spec_from_pipeline(pipe))
        pipe.remove_all_hooks()
        refuse_hooked(spec_from_pipeline(pipe))

    def test_sequential_offload(self, small_pipeline) -> None:
        """model offload on top strips the hooks and leaves the weights on the meta device."""
        from accelerate import cpu_offload

        pipe = small_pipeline("sd15-small")
        cpu_offload(pipe.unet, torch.device("meta"))
        with pytest.raises(VramplanError, match="unet already has sequential cpu offload"):
            refuse_hooked(spec_from_pipeline(pipe))

    def test_group_offload(self, small_pipeline) -> None:
        """A second call with other options mixes old and new groups without an error."""
        pipe = small_pipeline("sd15-small")
        apply_group_offloading(pipe.unet, torch.device("cpu"), offload_type="leaf_level")
        with pytest.raises(VramplanError, match="unet already has group offloading"):
            refuse_hooked(spec_from_pipeline(pipe))

    def test_layerwise_casting_is_described_and_can_be_planned(self, small_pipeline) -> None:
        pipe = small_pipeline("sd15-small")
        before = spec_from_pipeline(pipe).component("unet").weight_bytes
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        spec = spec_from_pipeline(pipe)
        refuse_hooked(spec)
        assert spec.component("unet").hooks == ("layerwise_casting",)
        assert spec.component("unet").weight_bytes < before
        assert [row for row in tried(spec) if any(isinstance(p["unet"], GroupOffload) for p in row.placements)]


def test_casting_after_group_offload_cannot_happen() -> None:
    """Pinned copies would keep the old dtype: weights come first, whatever the order of the settings."""
    hooks: dict[str, Any] = {"transformer": GroupOffload(stream=True), "vae": Resident()}
    order = grouped(hooks, {"transformer": LayerwiseCasting()})
    assert [setting.name for setting, _ in order] == ["layerwise_casting", "group_offload", "resident"]


def test_unified_memory() -> None:
    shared = card(name="Apple M4", kind="mps", unified=True)
    spec = text_to_image()
    reason = offload_refusal(spec.component("transformer"), spec, shared)
    assert reason == "Apple M4 shares one memory with the CPU: offloading frees nothing"
    found, _ = rows(spec, WORK, Fixed(), shared)
    placed = {setting for row in found for placement in row.placements for setting in placement.values()}
    assert placed == {Resident(), EncodeFirst()}, "what is gone is free in the one memory"


def test_eight_bit_weights_are_only_resident_or_gone() -> None:
    spec = with_part(component("text_encoder", role="text_encoder", blocks=4, move_refusal="it stays"))
    assert settings_of(spec, "text_encoder") == {Resident(), EncodeFirst()}


def test_sequential_offload_on_the_cpu_itself() -> None:
    with pytest.raises(UsageError, match="cannot run on the CPU itself"):
        SequentialCpuOffload().apply(SimpleNamespace(components={}), [], "cpu")
