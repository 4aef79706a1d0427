"""What pipelines can be asked for."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import SimpleNamespace

import pytest

from tests.support.profiles import profile_spec
from vramplan.errors import UsageError
from vramplan.pipeline.bundled import profile_class
from vramplan.pipeline.classes import class_facts
from vramplan.pipeline.describe import describe
from vramplan.pipeline.latents import size_step, smaller_size, vae_scale
from vramplan.pipeline.types import PipelineSpec
from vramplan.planner.legal import legal_workloads
from vramplan.profiles.catalogue import load_pipeline_profile, pipeline_names
from vramplan.workload import Workload, make_workload

# They count sides in pixels alone: sound has none, and Stable Cascade rounds to its own small latents unseen.
UNCHECKED = {"stable-audio-open", "stable-cascade", "stable-cascade-prior"}


def divisors(cls: type, spec: PipelineSpec) -> set[int]:
    """All numbers that the pipeline's own call divides the height by, to check it or to count latents."""
    spatial, _ = vae_scale(next(iter(spec.vaes), None))
    config = SimpleNamespace(**next(part.config for part in spec.components if part.role == "denoiser"))
    names = (
        "vae_scale_factor",
        "vae_scale_factor_spatial",
        "vae_spatial_scale_factor",
        "vae_spatial_compression_ratio",
    )
    patch = getattr(config, "patch_size", None)
    pipe = SimpleNamespace(
        **dict.fromkeys(names, spatial), patch_size=patch, transformer=SimpleNamespace(config=config)
    )
    found = set()
    for function in (getattr(cls, name, None) for name in ("check_inputs", "__call__", "prepare_latents")):
        tree = (
            ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))) if function else ast.Module([], [])
        )
        nodes = list(ast.walk(tree))
        assigned = {ast.unparse(node.targets[0]): node.value for node in nodes if isinstance(node, ast.Assign)}
        divided = (
            node for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod | ast.FloorDiv)
        )
        for node in divided:
            if ast.unparse(node.left) in ("height", "int(height)"):
                text = ast.unparse(assigned.get(ast.unparse(node.right), node.right))
                found.add(eval(text, {"self": pipe, "patch_size": patch}))
    return found


@pytest.mark.parametrize("name", pipeline_names())
def test_sizes_are_multiples_of_what_the_pipeline_checks_for(name: str) -> None:
    spec = profile_spec(name)
    checked = divisors(profile_class(load_pipeline_profile(name)), spec)
    assert bool(checked) == (name not in UNCHECKED)
    assert all(size_step(spec) % number == 0 for number in checked)
    work = Workload(height=1024, width=1024)
    for scale in (1 / 8, 0.3, 0.984, 1):
        sides = smaller_size(spec, work, scale)
        assert sides is not None
        assert all(side % number == 0 for side in sides for number in checked)


def test_the_numbers_read_off_the_calls_are_theirs() -> None:
    names = {"sana-1600m-1024": 32, "wan2.2-ti2v-5b": 32, "z-image-turbo": 16, "stable-diffusion-xl": 8, "cogview4": 16}
    for name, most in names.items():
        assert max(divisors(profile_class(load_pipeline_profile(name)), profile_spec(name))) == most


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "ltx-video", "mochi-1-preview", "allegro", "stable-diffusion-xl"])
def test_the_usual_workload_is_legal_and_the_ladder_goes_up(name: str) -> None:
    described = describe(name)
    usual = make_workload(described.defaults, {})
    for dimension in ("size", "batch", *(["frames"] if described.spec.video else [])):
        ladder = legal_workloads(dimension, described.spec, described.defaults, usual)
        amounts = [(work.height * work.width, work.num_frames, work.num_images_per_prompt) for work in ladder]
        assert usual in ladder
        assert amounts == sorted(set(amounts))


def test_wan_takes_what_its_vae_makes_four_at_a_time() -> None:
    described = describe("wan2.1-t2v-1.3b")
    usual = make_workload(described.defaults, {"height": 480, "width": 832})
    counts = [work.num_frames for work in legal_workloads("frames", described.spec, described.defaults, usual)]
    assert counts[:3] == [1, 5, 9]
    sizes = [(work.height, work.width) for work in legal_workloads("size", described.spec, described.defaults, usual)]
    assert (240, 416) in sizes
    assert all(height % 16 == width % 16 == 0 for height, width in sizes)


def test_pictures_have_no_frames() -> None:
    described = describe("stable-diffusion-1.5")
    usual = make_workload(described.defaults, {})
    with pytest.raises(UsageError, match="makes pictures"):
        legal_workloads("frames", described.spec, described.defaults, usual)
    with pytest.raises(UsageError, match="there are size, frames, batch"):
        legal_workloads("height", described.spec, described.defaults, usual)  # type: ignore[arg-type]


def test_sound_has_batches_alone() -> None:
    described = describe("stable-audio-open")
    usual = make_workload(described.defaults, {})
    for dimension in ("size", "frames"):
        with pytest.raises(UsageError, match=f"StableAudioPipeline makes sound, which has no {dimension}"):
            legal_workloads(dimension, described.spec, described.defaults, usual)
    ladder = legal_workloads("batch", described.spec, described.defaults, usual)
    assert [work.num_images_per_prompt for work in ladder[:3]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("sound", "names"),
    [
        (True, ("AudioLDM2Pipeline", "MusicLDMPipeline", "StableAudio3Pipeline")),
        (False, ("LTX2Pipeline", "DDPMPipeline", "StableCascadeDecoderPipeline")),
    ],
)
def test_what_makes_sound_is_told_from_its_call(sound: bool, names: tuple[str, ...]) -> None:
    import diffusers

    assert {name: class_facts(getattr(diffusers, name)).sound for name in names} == dict.fromkeys(names, sound)
