"""The bundled facts are true of the installed libraries, and the loader says where a file is wrong."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from vramplan.errors import UsageError, VramplanError
from vramplan.pipeline.build import build_weightless, component_class
from vramplan.pipeline.bundled import spec_from_profile, unknown_keys
from vramplan.profiles import files as profile_files
from vramplan.profiles.catalogue import (
    ComponentProfile,
    PipelineProfile,
    device_names,
    load_device_profile,
    load_pipeline_profile,
    pipeline_names,
    profile_path,
)

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[2]
PIPELINES = pipeline_names()
DEVICES = device_names()
# The distilled ones: their steps and their guidance are those of the example, not of the pipeline's call.
FROM_EXAMPLE = {"flux.1-schnell", "z-image-turbo"}
VIDEO = {
    "allegro",
    "animatediff",
    "cogvideox-1.5-5b",
    "cogvideox-2b",
    "cogvideox-5b",
    "hunyuanvideo",
    "ltx-video",
    "mochi-1-preview",
    "stable-video-diffusion",
    "wan2.1-i2v-14b-480p",
    "wan2.1-t2v-1.3b",
    "wan2.1-t2v-14b",
    "wan2.2-t2v-a14b",
    "wan2.2-ti2v-5b",
}
ASKED_FOR = VIDEO | {
    "auraflow",
    "chroma1-hd",
    "cogview4",
    "flux.1-dev",
    "flux.1-fill-dev",
    "flux.1-kontext-dev",
    "flux.1-schnell",
    "flux.2-dev",
    "flux.2-klein-4b",
    "hidream-i1-full",
    "hunyuan-dit-1.2",
    "kolors",
    "lumina-image-2.0",
    "pixart-alpha",
    "pixart-sigma",
    "qwen-image",
    "sana-1600m-1024",
    "stable-audio-open",
    "stable-cascade",
    "stable-cascade-prior",
    "stable-diffusion-1.5",
    "stable-diffusion-2.1",
    "stable-diffusion-3-medium",
    "stable-diffusion-3.5-large",
    "stable-diffusion-3.5-medium",
    "stable-diffusion-xl",
    "z-image-turbo",
}
PARTS = [(pipeline, name) for pipeline in PIPELINES for name in sorted(load_pipeline_profile(pipeline).components)]


def all_tensors(module: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    return (*module.parameters(), *module.buffers())


@cache
def counted(library: str, class_name: str, config: str) -> int:
    module = build_weightless(library, class_name, json.loads(config))
    # SVD's mixing factors are made by a constructor that heeds no device: one number each.
    assert all(tensor.device.type == "meta" or tensor.numel() == 1 for tensor in all_tensors(module))
    return sum(parameter.numel() for parameter in module.parameters())


def component(pipeline: str, name: str) -> ComponentProfile:
    return load_pipeline_profile(pipeline).components[name]


def roles(pipeline_class: Any) -> tuple[set[str], set[str], set[str]]:
    """What a pipeline class takes: modules it must have, those it may do without, and plain settings."""
    import diffusers

    required, settings = diffusers.DiffusionPipeline._get_signature_keys(pipeline_class)
    optional = set(pipeline_class._optional_components)
    return {name for name in required if name != "self"} - optional, optional, set(settings)


def example_of(name: str) -> str:
    """The example in the docstring of a profile's pipeline."""
    import diffusers

    call = getattr(diffusers, load_pipeline_profile(name).pipeline).__call__
    return str(call.__doc__)


def call_defaults(name: str) -> dict[str, Any]:
    """What the call of a profile's pipeline takes, with the defaults."""
    import diffusers

    call = getattr(diffusers, load_pipeline_profile(name).pipeline).__call__
    return {key: parameter.default for key, parameter in inspect.signature(call).parameters.items()}


def test_the_asked_for_profiles_are_there() -> None:
    assert set(PIPELINES) == ASKED_FOR


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_profile_loads_and_is_named_as_its_file(name: str) -> None:
    profile = load_pipeline_profile(name)
    assert profile.name == name
    assert profile.workload.height > 0
    assert (profile.workload.num_frames is not None) == (name in VIDEO)
    for repo in profile.repos:
        assert load_pipeline_profile(repo.swapcase()) == profile


@pytest.mark.parametrize(("pipeline", "name"), PARTS)
def test_a_component_has_the_parameters_the_profile_says(pipeline: str, name: str) -> None:
    part = component(pipeline, name)
    found = component_class(part.library, part.class_name)
    if part.parameters is None:
        assert not hasattr(found, "parameters")
    else:
        assert counted(part.library, part.class_name, json.dumps(part.config)) == part.parameters


# A figure as others give it: parameters, or the size of them all in a dtype; of two components alike together.
PUBLISHED = re.compile(
    r"(?P<figure>[\d.]+) ?(?P<unit>M|B|MB|GB)(?P<both> for both)?(?: in (?P<dtype>bfloat16|float16|float32))? \(.+\)"
)
# Denoisers of which nobody's figure was found.
UNPUBLISHED = {"animatediff", "ltx-video", "stable-video-diffusion"}
UNITS = {"M": 10**6, "B": 10**9, "MB": 10**6, "GB": 10**9}


@pytest.mark.parametrize(("pipeline", "name"), [part for part in PARTS if component(*part).published])
def test_the_count_is_the_published_one_to_the_last_digit_that_it_has(pipeline: str, name: str) -> None:
    """Rounded or cut off: within one of its last digit."""
    part = component(pipeline, name)
    told = PUBLISHED.fullmatch(part.published or "")
    assert told, part.published
    figure, unit = told["figure"], UNITS[told["unit"]]
    assert (told["dtype"] is not None) == told["unit"].endswith("B", 1)
    each = {"float32": 4, None: 1}.get(told["dtype"], 2) * (2 if told["both"] else 1)
    last = unit / 10 ** len(figure.partition(".")[2])
    assert part.parameters is not None
    assert abs(part.parameters * each - float(figure) * unit) <= last


def test_what_most_of_a_pipeline_weighs_is_published() -> None:
    denoisers = [part for part in PARTS if part[1] in ("transformer", "unet", "prior", "prior_prior", "decoder")]
    assert {pipeline for pipeline, _ in denoisers} == set(PIPELINES)
    assert {pipeline for pipeline, name in denoisers if not component(pipeline, name).published} == UNPUBLISHED


@pytest.mark.parametrize(("pipeline", "name"), PARTS)
def test_every_key_of_a_configuration_is_one_the_class_knows(pipeline: str, name: str) -> None:
    assert unknown_keys(component(pipeline, name)) == []


@pytest.mark.parametrize(("pipeline", "name"), PARTS)
def test_what_is_recalled_is_marked(pipeline: str, name: str) -> None:
    part = component(pipeline, name)
    assert part.unconfirmed == ("recalled" in part.source)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_profile_has_the_modules_its_pipeline_class_takes(name: str) -> None:
    import diffusers

    profile = load_pipeline_profile(name)
    required, optional, settings = roles(getattr(diffusers, profile.pipeline))
    parts = set(profile.components)
    assert required - parts == set()
    # A module with a default (HunyuanDiT's second text encoder) is among the settings of the signature.
    assert parts - required <= optional | settings
    assert profile.settings.keys() <= settings - optional - parts


@pytest.mark.parametrize("name", PIPELINES)
def test_the_default_workload_is_the_one_of_the_pipeline(name: str) -> None:
    work = load_pipeline_profile(name).workload
    assert ("example" in work.source) == (name in FROM_EXAMPLE)
    defaults = call_defaults(name)
    if name in FROM_EXAMPLE:
        example = example_of(name)
        assert f"num_inference_steps={work.num_inference_steps}," in example
        assert f"guidance_scale={work.guidance_scale}" in example
    else:
        assert defaults["num_inference_steps"] == work.num_inference_steps
        assert defaults.get("guidance_scale") == work.guidance_scale


@pytest.mark.parametrize("name", PIPELINES)
def test_the_default_size_is_the_one_of_the_pipeline_where_its_call_says_one(name: str) -> None:
    work = load_pipeline_profile(name).workload
    defaults = call_defaults(name)
    asked = {"height": work.height, "width": work.width, "num_frames": work.num_frames}
    assert {key: value for key, value in asked.items() if defaults.get(key) not in (None, value)} == {}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_scheduler_can_be_made(name: str) -> None:
    part = component(name, "scheduler")
    scheduler = component_class(part.library, part.class_name).from_config(part.config)
    assert {key: scheduler.config[key] for key in part.config} == part.config


def test_a_component_is_loaded_in_its_own_dtype_where_it_has_one() -> None:
    spec = spec_from_profile(load_pipeline_profile("wan2.1-t2v-1.3b"), dtype="float16")
    assert {part.name: part.dtype for part in spec.components} == {
        "text_encoder": "float16",
        "transformer": "float16",
        "vae": "float32",
    }


@pytest.mark.parametrize(
    ("load", "wrong", "meant"),
    [
        (load_pipeline_profile, "cogvideo-5b", "cogvideox-5b"),
        (load_pipeline_profile, "THUDM/CogVideoX-5", "THUDM/CogVideoX-5b"),
        (load_device_profile, "RTX4090", "rtx-4090"),
        (lambda name: profile_path("devices", name), "a100", "a100-40gb"),
        (load_device_profile, "4090", "rtx-4090"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(load: Callable[[str], Any], wrong: str, meant: str) -> None:
    with pytest.raises(UsageError, match=rf"{wrong}.*did you mean .*{meant}"):
        load(wrong)


def test_a_name_like_no_other_lists_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"there are .*rtx-4090"):
        load_device_profile("zzzzzz")


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """A way to have the SD 1.5 profile as the only one, with one thing changed."""
    original = yaml.safe_load(profile_path("pipelines", "stable-diffusion-1.5").read_text(encoding="utf-8"))
    path = tmp_path / "pipelines" / "broken.yaml"
    path.parent.mkdir()
    monkeypatch.setattr(profile_files, "bundled_directory", lambda: tmp_path)

    def write(change: Callable[[dict[str, Any]], object]) -> Path:
        change(original)
        path.write_text(yaml.safe_dump(original), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda it: it.update(colour="red"), "colour: Unexpected keyword argument"),
        (lambda it: it["components"]["unet"].update(colour="red"), "components.unet.colour: Unexpected"),
        (
            lambda it: it["components"]["unet"].update(class_name="X"),
            "components.unet.class_name: Unexpected",
        ),
        (
            lambda it: it["components"]["unet"].update(parameters="many"),
            "components.unet.parameters: Input should be",
        ),
        (
            lambda it: it["components"]["unet"].update(parameters="7"),
            "components.unet.parameters: Input should be",
        ),
        (lambda it: it["components"]["unet"].pop("class"), "components.unet.class: Field required"),
        (lambda it: it["workload"].update(height=512.5), "workload.height: Input should be"),
        (lambda it: it.update(dtype="float8"), "dtype: Input should be"),
        (lambda it: it.pop("repos"), "repos: Field required"),
    ],
)
def test_a_mistake_is_named_with_its_place(
    broken: Callable[[Callable[[dict[str, Any]], object]], Path],
    change: Callable[[dict[str, Any]], object],
    place: str,
) -> None:
    path = broken(change)
    with pytest.raises(VramplanError) as caught:
        load_pipeline_profile("broken")
    assert str(caught.value).startswith(f"{path}: {place}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("name: 2024-01-01", "more than plain values"),
        ("- 1", "the whole document"),
        ("", "the whole document"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices" / "odd.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(profile_files, "bundled_directory", lambda: tmp_path)
    with pytest.raises(VramplanError, match=said) as caught:
        load_device_profile("odd")
    assert "odd.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_facts_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_files, "__file__", str(tmp_path / "vramplan" / "profile_files.py"))
    with pytest.raises(VramplanError, match="install vramplan again"):
        pipeline_names()


def test_profiles_are_values() -> None:
    profile: PipelineProfile = load_pipeline_profile("flux.1-dev")
    assert profile == load_pipeline_profile("FLUX.1-dev")
    with pytest.raises(AttributeError):
        profile.name = "other"  # type: ignore[misc]


def test_importing_the_loader_imports_nothing_heavy() -> None:
    code = (
        "import sys, vramplan.profiles.catalogue; "
        "print([name for name in ('torch', 'diffusers', 'pydantic', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_wheel_carries_the_facts(tmp_path: Path) -> None:
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("vramplan-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert {f"vramplan/profiles/_bundled/pipelines/{name}.yaml" for name in PIPELINES} <= held
    assert {f"vramplan/profiles/_bundled/devices/{name}.yaml" for name in DEVICES} <= held
